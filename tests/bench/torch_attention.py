#!/usr/bin/env python3
"""Times PyTorch's fused attentions (cuDNN's, FlashAttention's) where `cuda_bench --only attention`
times ours: causal, bf16, 12 heads of 64, median of 50 by events. Prints one JSON object a line."""
import json
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def median_ms(run):
    for _ in range(5):
        run()
    times = []
    for _ in range(50):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main():
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION),
                          ("flash", SDPBackend.FLASH_ATTENTION)):
        for streams, tokens in ((1, 512), (16, 1024), (32, 1024)):
            qkv = torch.randn(3, streams, 12, tokens, 64, device="cuda", dtype=torch.bfloat16)
            q, k, v = (part.requires_grad_() for part in qkv.unbind())
            line = {"library": name, "streams": streams, "tokens": tokens,
                    "torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
            try:
                with sdpa_kernel(backend):
                    with torch.no_grad():
                        line["forward_ms"] = median_ms(
                            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
                    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                    do = torch.randn_like(o)
                    line["backward_ms"] = median_ms(
                        lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True))
            except RuntimeError as error:
                line["error"] = str(error)[:200]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
