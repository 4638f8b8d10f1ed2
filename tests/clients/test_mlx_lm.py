"""mlx-lm, on a CPU, computes exported families as `transformers` does, refuses them, or has a limit of docs/open_moes.md."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from nlgmoe.tools.hugging_face.export import export
from nlgmoe.tools.hugging_face.importing import import_model
from tests.support.open_models import VARIANTS, their_model, tokens

REFUSED = (  # variants with tied embeddings, dense blocks or widths of heads that mlx-lm lacks
    *("qwen2_moe, a dense block", "glm4_moe, norms of heads", "glm4_moe_lite, dense blocks", "granitemoe, wide heads"),
    *("granitemoeshared", "deepseek_v3, whole queries", "deepseek_v2, groups"),
)
IGNORED = ("minimax_m2", "mixtral", "qwen3_moe")  # families whose scaled positions mlx-lm ignores


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_mlx_lm_logits_and_greedy_texts_are_equal_or_its_limit_is_known(variant: str, tmp_path: Path) -> None:
    theirs, prompt = their_model(variant), [5, 6, 7, 8]
    theirs.save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours.ckpt")
    export(tmp_path / "ours.ckpt", tmp_path / "exported")
    if variant.startswith(REFUSED):
        with pytest.raises((ValueError, AttributeError)):
            load_model(tmp_path / "exported")
        return
    model, _ = load_model(tmp_path / "exported")
    expected = theirs(tokens()).logits.numpy()
    error = np.abs(np.array(model(mx.array(tokens().numpy()))) - expected).max()
    if theirs.config.rope_parameters["rope_type"] != "default" and variant.startswith(IGNORED):
        assert error > 0.5
        return
    assert error < (1e-4 if variant.startswith("glm4_moe_lite") else 1e-5)
    made = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=12)]
    greedy = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert made == greedy.tolist()
