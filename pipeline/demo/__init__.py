"""The demonstration: a very small Qwen2.5-VL that reads the synthetic slips it was trained on, and how both are made."""
