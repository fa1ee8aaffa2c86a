"""Demonstration model: a very small Qwen2.5-VL that reads synthetic invoices and receipts, and the code that makes both."""
