"""Share of a GPU's peak that the exact scorer reaches at the layer shapes of a 7B model."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.sqsd.setting import Run
from safeft.adapters import LoraFactors
from safeft.data import TokenisedRow
from safeft.sqsd import Projection, SqsdScorer

LAYERS, VOCABULARY, TOKENS, TRAINED = 4, 32_000, 256, 160


def peak_share(run: Run) -> None:
    """FLOP/s of scoring ÷ FLOP/s of one large bf16 matrix product on the same GPU."""
    if not torch.cuda.is_available():
        run.skip("gpu_peak_share", "no GPU")
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    covered = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }

    def adapter(seed: int) -> LoraFactors:
        draw = torch.Generator().manual_seed(seed)
        pairs = {
            name: (
                torch.randn(8, module.in_features, generator=draw) / 64,
                torch.randn(module.out_features, 8, generator=draw) * 0.01,
            )
            for name, module in covered.items()
        }
        return LoraFactors(2.0, pairs)

    state = adapter(0)
    sides = (Projection(state, adapter(seed)) for seed in (1, 2))
    scorer = SqsdScorer(model, *sides, pad_token_id=0)
    count = 64 if run.quick else 256
    ids = torch.randint(3, VOCABULARY, (count, TOKENS)).tolist()
    prompt = TOKENS - TRAINED
    rows = [TokenisedRow(i, row, [-100] * prompt + row[prompt:]) for i, row in enumerate(ids)]
    scorer.score(rows[:32])
    times = []
    for _ in range(5):
        started = time.perf_counter()
        scorer.score(rows)  # ends with a copy to the CPU
        times.append(time.perf_counter() - started)
    body = sum(module.weight.numel() for module in covered.values())
    flop = 4.0 * count * (body * TOKENS + VOCABULARY * 4096 * TRAINED)
    reached, peak = flop / statistics.median(times), _product_rate()
    run.add(
        "gpu_peak_share",
        reached / peak,
        f"{torch.cuda.get_device_name()}: {reached / 1e12:.0f} of {peak / 1e12:.0f} TFLOP/s "
        f"(a bf16 product of 8192 squared), {LAYERS} layers, {TOKENS} tokens a row, one state",
    )


def _product_rate() -> float:
    size = 8192
    one = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    other = torch.randn_like(one)
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        started = time.perf_counter()
        one @ other
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2.0 * size**3 / statistics.median(times)
