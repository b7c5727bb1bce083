"""What training computes in a cheaper way is what the pipeline computes."""

import pytest
import torch

from turbo_opt.calibration.latents import denormalise, normalise
from turbo_opt.calibration.tiny_wan import whole_clip
from turbo_opt.calibration.tiny_wan.architecture import (
    TransformerSize,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from turbo_opt.calibration.tiny_wan.clips import TEMPLATES, caption, combinations
from turbo_opt.calibration.tiny_wan.compact_text import CompactText
from turbo_opt.calibration.tiny_wan.train_denoiser import encode_text


@torch.no_grad()
def test_whole_clip_equals_frame_by_frame() -> None:
    torch.manual_seed(0)
    vae = build_vae().eval()
    for parameter in vae.parameters():
        if parameter.ndim == 1:
            parameter.normal_(std=0.1)  # biases show what padding and caching do
    video = torch.rand(1, 3, 9, 32, 32) * 2 - 1
    expected = vae.encode(video).latent_dist
    mean, log_variance = whole_clip.encode(vae, video)
    torch.testing.assert_close(mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_variance, expected.logvar, rtol=1e-4, atol=1e-5)
    drawn = whole_clip.decode(vae, mean).clamp(-1, 1)
    torch.testing.assert_close(drawn, vae.decode(mean).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_normalising_latents_is_undone() -> None:
    vae = build_vae()
    vae.register_to_config(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    latents = torch.randn(1, 16, 2, 3, 3)
    normal = normalise(vae, latents)
    torch.testing.assert_close(normal, (latents - 0.5) / 2)
    torch.testing.assert_close(denormalise(vae, normal), latents)


def test_a_clip_of_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="4n\\+1 frames, got 16"):
        whole_clip.encode(build_vae(), torch.zeros(1, 3, 16, 16, 16))


@torch.no_grad()
def test_compact_text_equals_512_positions() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    transformer = build_transformer(TransformerSize(num_layers=1, ffn_dim=128)).eval()
    text_encoder = build_text_encoder(len(tokenizer)).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    captions = [caption(combinations()[5]), ""]
    latents, time = torch.randn(2, 16, 2, 8, 8), torch.tensor([300.0, 900.0])

    def embed(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        token_ids = tokenizer(
            captions, padding="max_length", max_length=length, return_tensors="pt"
        ).input_ids
        return encode_text(text_encoder, token_ids)

    expected = transformer(latents, time, embed(512)[0], return_dict=False)[0]
    with CompactText(transformer) as text:
        embeddings, mask = embed(24)
        text.set(mask)
        compact = transformer(latents, time, embeddings, return_dict=False)[0]
    torch.testing.assert_close(compact, expected, rtol=1e-4, atol=1e-5)
    restored = transformer(latents, time, embed(512)[0], return_dict=False)[0]
    torch.testing.assert_close(restored, expected)


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
def test_captions_survive_the_tokenizer(template: int) -> None:
    tokenizer = build_tokenizer()
    text = caption(combinations()[40], template)
    token_ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(token_ids)[-1] == "</s>"
    assert tokenizer.unk_token_id not in token_ids
    assert tokenizer.decode(token_ids[:-1]).replace(" ,", ",") == text
