"""Run as a program: a GGUF file becomes a directory of fp32 safetensors and a tokenizer.

``python -P convert_gguf.py model.gguf directory``. Prints a "step: ..." line as each step begins.
A process of its own, because transformers then takes its memory (eight bytes a weight), its
progress bars and its crashes with it when it ends. Imports nothing of safeft.
"""

from __future__ import annotations

import sys
from pathlib import Path

STEP = "step: "  # other lines on stdout are some library's


def main(gguf: Path, directory: Path) -> None:
    """Load the GGUF dequantised, forget that it was quantised, save it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"{STEP}reading the tokenizer", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    print(f"{STEP}reading and dequantising the weights", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are plain fp32 now, but save_pretrained refuses a model that says "quantised".
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    print(f"{STEP}writing safetensors", flush=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
