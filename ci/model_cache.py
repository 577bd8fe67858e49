# SPDX-License-Identifier: Apache-2.0
"""An offline model cache for the engine's own tests, made in seconds without a network.

The tests name public models but need only something that loads: a configuration of the right
architecture, for some a tokenizer, for a few weights. Each is made here at the smallest size that
the tests accept, in the folder layout of the hub's cache, so that `HF_HOME=<folder>` together with
`HF_HUB_OFFLINE=1` finds them.

    python -m ci.model_cache <folder>
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pydoc_data.topics
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

# Their ids are their places here.
SPECIAL_TOKENS = (
    "<s>",
    "</s>",
    "<pad>",
    "<image>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
)
VOCAB = 2048
STAMP = "complete"


@dataclass(frozen=True)
class Repo:
    """One model repository: `config` are the fields that differ from the library's defaults."""

    name: str
    model_type: str
    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    image_processor: str = ""
    tokenizer: bool = False
    weights: bool = False


def _decoder(max_len: int, **fields: Any) -> dict[str, Any]:
    """Sizes of a two-layer decoder with grouped heads."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": max_len,
        **fields,
    }


LLAMA = ("llama", "LlamaForCausalLM")
REPOS = (
    Repo(
        "facebook/opt-125m",
        "opt",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
        },
        tokenizer=True,
        weights=True,
    ),
    Repo(
        "hmellor/tiny-random-LlamaForCausalLM",
        *LLAMA,
        _decoder(8192),
        tokenizer=True,
        weights=True,
    ),
    Repo("meta-llama/Llama-3.2-1B", *LLAMA, _decoder(131072), tokenizer=True),
    Repo("meta-llama/Llama-3.2-1B-Instruct", *LLAMA, _decoder(131072)),
    Repo("TinyLlama/TinyLlama-1.1B-Chat-v1.0", *LLAMA, _decoder(2048)),
    Repo(
        "Qwen/Qwen3-0.6B",
        "qwen3",
        "Qwen3ForCausalLM",
        _decoder(40960),
        tokenizer=True,
        weights=True,
    ),
    Repo("Qwen/Qwen1.5-7B", "qwen2", "Qwen2ForCausalLM", _decoder(32768)),
    Repo(
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "image_token_id": 4,
            "video_token_id": 5,
            "vision_start_token_id": 6,
            "vision_end_token_id": 7,
        },
        tokenizer=True,
        image_processor="Qwen2VLImageProcessor",
    ),
    Repo(
        "llava-hf/llava-1.5-7b-hf",
        "llava",
        "LlavaForConditionalGeneration",
        {"image_token_index": 3},
        tokenizer=True,
        image_processor="CLIPImageProcessor",
    ),
    Repo("deepseek-ai/DeepSeek-V2-Lite", "deepseek_v2", "DeepseekV2ForCausalLM"),
)


def build(folder: Path) -> Path:
    """Makes the cache in `folder` unless this version of it is there, and returns `folder`."""
    stamp = folder / STAMP
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == version:
        return folder
    transformers: Any = import_module("transformers")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that a build cut short leaves nothing that looks like a cache.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "cache"
        tokenizer = _tokenizer()
        transformers.utils.logging.disable_progress_bar()
        for repo in REPOS:
            _write(repo, made / "hub", tokenizer)
        (made / STAMP).write_text(version, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _write(repo: Repo, hub: Path, tokenizer: Any) -> None:
    import torch

    transformers: Any = import_module("transformers")
    revision = hashlib.sha1(repo.name.encode()).hexdigest()
    root = hub / f"models--{repo.name.replace('/', '--')}"
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(revision, encoding="utf-8")
    config = transformers.AutoConfig.for_model(
        repo.model_type,
        architectures=[repo.architecture],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float16",
        **repo.config,
    )
    config.save_pretrained(snapshot)
    if repo.image_processor:
        getattr(transformers, repo.image_processor)().save_pretrained(snapshot)
    if repo.tokenizer:
        tokenizer.save_pretrained(snapshot)
    if repo.weights:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.to(torch.float16).save_pretrained(snapshot)


def _tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the manual that comes with every Python."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(pydoc_data.topics.topics.values(), trainer)
    bos, eos, pad = SPECIAL_TOKENS[:3]
    transformers: Any = import_module("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    # Nothing may reach for a network, even where a library would try.
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(build(parser.parse_args().folder))


if __name__ == "__main__":
    main()
