"""vLLM's own Chat Completions server with a checkpoint, on the CPU."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

from tests.support.chat_server import serve_chat

VLLM_OPTIONS = {
    "--served-model-name": "demo",
    "--max-model-len": "8192",
    "--max-num-seqs": "16",
    "--limit-mm-per-prompt": '{"image": 4, "video": 0}',
    "--structured-outputs-config": '{"backend": "guidance"}',
}
VLLM_SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
VLLM_QUICK = {"TORCH_COMPILE_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}


def serve_vllm(folder: Path) -> AbstractContextManager[str]:
    """Start vLLM's own server of a checkpoint, on the CPU, as small and as soon as it can be; it calls the model `demo`."""
    options = [word for option in VLLM_OPTIONS.items() for word in option]
    command = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--enforce-eager", *options)
    return serve_chat(*command, **VLLM_SMALL, **VLLM_QUICK)
