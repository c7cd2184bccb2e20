"""Which of ``scaled_dot_product_attention``'s backends serve calls whose lengths change.

cuDNN, which PyTorch prefers on Hopper and Blackwell where it is new enough, builds an execution plan for every shape
that a thread has not had before: 35 to 55 ms on an H100, where a 7B's whole prefill of 1400 rows takes 30 ms, 1 ms more
by flash attention. A cache that grows has a new shape at every token. The other backends build nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch.backends import cuda

# Rows of a prompt from which on cuDNN is worth its plan. 28 layers of a 7B are 1 ms faster by it at 1360 rows, and by
# the square of rows 10 ms at 4096 and 40, which a plan takes, at 8192; prompts of one length may come again.
MANY_ROWS = 4096

_LOCK = Lock()
_open = 0  # blocks that hold cuDNN off


@contextmanager
def without_cudnn_attention(rows: int = 0) -> Iterator[None]:
    """While the block lasts, ``scaled_dot_product_attention`` does without cuDNN, and then has it again if it had.

    ``rows``: of a prompt, where the block is its prefill alone; from ``MANY_ROWS`` on nothing is done.
    Nothing is done where the user has disabled flash or efficient attention: flash takes no mask, and efficient no
    groups of heads in older versions, so that a call of cuDNN's might find no other. PyTorch's flags are those of the
    process: what other threads compute meanwhile does without cuDNN too, and of blocks that overlap the last to end
    gives it back. Whoever sets cuDNN's flag meanwhile, here or in another thread, finds it set anew then. What
    ``torch.compile`` traces in the block keeps the backend that was chosen there.
    """
    global _open
    with _LOCK:
        has_others = cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled()
        holds = rows < MANY_ROWS and has_others and (_open > 0 or cuda.cudnn_sdp_enabled())
        if holds:
            cuda.enable_cudnn_sdp(False)
            _open += 1
    try:
        yield
    finally:
        with _LOCK:
            if holds:
                _open -= 1
                if not _open:
                    cuda.enable_cudnn_sdp(True)
