"""Models without a checkpoint: configurations, a tokenizer, and weights with which the text varies.

usage: made_up.py FOLDER      writes a folder per model
"""

from __future__ import annotations

import itertools
import json
import os
import string
import sys
import zlib
from pathlib import Path

_COMMON = {
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    # Two layers of Qwen3-8B's size: merged qkv and gate_up, a head of its own.
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 32000, "tie_word_embeddings": False, "attention_bias": False,
    },
    # A bias on qkv, the head tied to the embedding, heads of 64.
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
    # SmolLM2-135M's shape: three query heads share one of K and V.
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    },
    # So many KV heads that attention's splits double within the contexts of the proof.
    "qwen3-32": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 32, "head_dim": 128,
        "vocab_size": 32000, "tie_word_embeddings": False, "attention_bias": False,
    },
    # Heads that are no power of two.
    "llama-96": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 96,
        "vocab_size": 32000, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
    },
}  # fmt: skip
SPECIAL = ("<|endoftext|>", "<s>", "</s>")  # the first is one that Qwen2's tokenizer would add otherwise


def write(folder: Path) -> None:
    """The model folders, without weights."""
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**_COMMON, **config}))
        write_tokenizer(folder / name, int(str(config["vocab_size"])))


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte a token where text is read; tokens that are generated may also be words of 2 to 4 small letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = ("".join(word) for length in (2, 3, 4) for word in itertools.product(string.ascii_lowercase, repeat=length))
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += itertools.islice(words, size - len(names))
    tokenizer = Tokenizer(models.BPE({name: at for at, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "chat_template": template}))


def use() -> None:
    """Makes `load_format="dummy"` fill the weights: norms at one, matrices N(0, 0.03), each from its own seed."""
    import torch
    import vllm.model_executor.model_loader.dummy_loader as dummy_loader

    def fill(self: object, model: torch.nn.Module, model_config: object) -> None:
        for name, parameter in sorted(model.named_parameters()):
            device = parameter.device
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            if parameter.dim() == 1 and "norm" in name:
                parameter.data.fill_(1.0)
            else:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device=device).mul_(0.03))

    dummy_loader.DummyModelLoader.load_weights = fill


def door(folder: Path) -> str:
    """The PYTHONPATH under which every process of a server calls `use`: as a plugin of vLLM's, laid into `folder`."""
    plugin = folder / "made_up_weights-0.dist-info"
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-weights\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nmade_up_weights = made_up:use\n")
    return os.pathsep.join([str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
