"""Model folders with a real architecture and random weights: something to serve where nothing may be downloaded.

usage: python tinymodels.py DIR tiny|small|medium [DIR SIZE ...]

Llama shapes with a word-level tokenizer: one word is one token and every unknown word is `<unk>`, so natural text works
and token counts are easy to check. The weights are random from a fixed seed: the same files each time, and answers that
mean nothing. `tiny`, `small` and `medium` differ by more than a factor of two in the work of a token.

Runs as a plain script, because the environment that has torch and transformers need not have energyd.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

_SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
_CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
_SEED = 20250213


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's dimensions. The head size `hidden / heads` is 64: vLLM's CPU attention has no smaller one."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


SHAPES = {
    "tiny": Shape(hidden=256, layers=2, heads=4, kv_heads=2, intermediate=512),
    "small": Shape(hidden=512, layers=6, heads=8, kv_heads=4, intermediate=1408),
    "medium": Shape(hidden=768, layers=10, heads=12, kv_heads=4, intermediate=2048),
}
VOCABULARY = 2048
MAX_POSITIONS = 4096


def make(folder: Path, size: str) -> Path:
    """Write a model of `size` (a key of `SHAPES`) into `folder` and return it; a finished folder is left as it is.

    Needs torch, transformers and tokenizers; raises ImportError without them, KeyError for an unknown size.
    """
    shape = SHAPES[size]
    done = folder / "model.safetensors"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(folder)
    _save_weights(folder, shape)
    return folder


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415 - only this verb needs it
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - the same

    vocabulary = {word: n for n, word in enumerate(_SPECIAL)}
    vocabulary |= {f"w{n}": n for n in range(len(_SPECIAL), VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - a token, not a password
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",  # noqa: S106 - the same
        eos_token="</s>",  # noqa: S106 - the same
        pad_token="<pad>",  # noqa: S106 - the same
        unk_token="<unk>",  # noqa: S106 - the same
    )
    fast.chat_template = _CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _save_weights(folder: Path, shape: Shape) -> None:
    import torch  # noqa: PLC0415 - only this verb needs it
    from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: PLC0415 - the same

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        # float32: most CPUs have no bfloat16 arithmetic and emulate it many times slower.
        dtype="float32",
    )
    config.architectures = ["LlamaForCausalLM"]
    torch.manual_seed(_SEED)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def main(arguments: list[str]) -> int:
    """Make the models named by pairs of folder and size; returns the exit code."""
    pairs = list(zip(arguments[::2], arguments[1::2], strict=False))
    unknown = sorted({size for _, size in pairs} - SHAPES.keys())
    if not pairs or len(arguments) % 2 or unknown:
        what = f"unknown size {unknown[0]!r}" if unknown else "expected pairs of folder and size"
        sys.stderr.write(f"tinymodels: {what}; usage: tinymodels.py DIR {'|'.join(SHAPES)} [DIR SIZE ...]\n")
        return 2
    for folder, size in pairs:
        make(Path(folder), size)
        sys.stdout.write(f"{folder}: {size}, random weights\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
