"""Tiny random configurations of Hugging Face models: what their layers do with weights is the library's, not ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.models.check import Inputs, trains_with_default_kfac

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:KFAC", "ignore::DeprecationWarning", "ignore::FutureWarning")

VOCABULARY, LENGTH, BATCH, LABELS = 13, 6, 4, 3
Case = tuple[nn.Module, Inputs, Tensor]


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(length))


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert() -> Case:
    """With a padding mask for the attention, to one label per sequence."""
    config = transformers.BertConfig(**SMALL, max_position_embeddings=LENGTH, num_labels=LABELS)
    attention = torch.ones(BATCH, LENGTH, dtype=torch.long)
    attention[0, 4:] = 0
    model = transformers.BertForSequenceClassification(config)
    return model, ((tokens(),), {"attention_mask": attention}), torch.arange(BATCH) % LABELS


def gpt2() -> Case:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), ((tokens(),), {"use_cache": False}), tokens().roll(-1, 1)


def llama() -> Case:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=LENGTH)
    return transformers.LlamaForCausalLM(config), ((tokens(),), {"use_cache": False}), tokens().roll(-1, 1)


def t5() -> Case:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    keywords = {"input_ids": tokens(), "decoder_input_ids": tokens(5), "use_cache": False}
    return transformers.T5ForConditionalGeneration(config), ((), keywords), tokens(5).roll(-1, 1)


def vit() -> Case:
    options = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    config = transformers.ViTConfig(**options, image_size=16, patch_size=4, num_labels=LABELS)
    return transformers.ViTForImageClassification(config), ((numbers(BATCH, 3, 16, 16),), {}), torch.arange(BATCH) % LABELS


def whisper() -> Case:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=4, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=8, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    keywords = {"input_features": numbers(BATCH, 4, 16), "decoder_input_ids": tokens(5), "use_cache": False}
    return transformers.WhisperForConditionalGeneration(config), ((), keywords), tokens(5).roll(-1, 1)


def mamba() -> Case:
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config), ((tokens(),), {"use_cache": False}), tokens().roll(-1, 1)


def mixtral() -> Case:
    config = transformers.MixtralConfig(
        **SMALL, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=LENGTH
    )
    return transformers.MixtralForCausalLM(config), ((tokens(),), {"use_cache": False}), tokens().roll(-1, 1)


MODELS: dict[str, Callable[[], Case]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "vit": vit,
    "whisper": whisper,
    "mamba": mamba,
    "mixtral": mixtral,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_tiny_random_model_trains(name):
    torch.manual_seed(0)
    # Fused experts multiply in single precision alone.
    trains_with_default_kfac(*MODELS[name](), in_double=name != "mixtral")
