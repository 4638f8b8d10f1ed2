"""A whole script in the tutorial's style becomes its settings; the command and its inputs."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nlgmoe import load_config
from nlgmoe.commands.main import main
from nlgmoe.tools.megatron.from_megatron import translated
from tests.megatron.writing import get, launched
from tests.support.commands import error_of

SETTINGS = yaml.safe_load("""
model.config:
  {seq_len: 2048, num_layers: 24, hidden_size: 1024, num_heads: 16, hidden_dropout: 0.1, attention_dropout: 0.1,
   init_std: 0.014, layer_norm_eps: 1.0e-5, vocab_size_multiple: 128, moe: {
     num_experts: [32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 64, 64], expert_interval: 2, top_k: 1, mlp_type: residual,
     train_capacity_factor: 1.0, eval_capacity_factor: 1.0, min_capacity: 4, loss_coeff: 0.01,
     token_dropping: true, eval_token_dropping: true, aux_scope: rank}}
model.optimizer: {lr: 2.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.1}
model.schedule: {shape: cosine, warmup_tokens: 375000000, min_lr: 2.0e-6, decay_tokens: 300000000000}
model.train_tokens: 300000000000
model.activation_checkpointing: true
model.seed: 1234
data:
  {tokenizer: gpt2, micro_batch_size: 4, global_batch_size: 256, num_workers: 0, seed: 1234,
   max_eval_windows: 2560,  # 10 batches of 256
   corpus: {class_path: nlgmoe.data.MegatronIndexed,
            init_args: {prefix: /data/pile/pile_text_document, split: [98, 2, 0]}}}
trainer.default_root_dir: out/pr-moe-lr-2.0e-4-gpus-64
trainer.devices: 8
trainer.num_nodes: 8
trainer.precision: 16-mixed
trainer.strategy:
  class_path: nlgmoe.ExpertParallelStrategy
  init_args: {stage: 1, expert_parallel_size: 64, offload_optimizer: false,
              initial_scale_power: 11, loss_scale_window: 500, hysteresis: 2}
trainer.max_steps: 1716613  # 300e9 * 3 / 256 / 2048
trainer.max_time: "20833:08:00:00"  # 30,000,000 minutes
trainer.gradient_clip_val: 1.0
trainer.val_check_interval: 100
trainer.log_every_n_steps: 10
""")
BLEND = yaml.safe_load("""
data.corpus:
  class_path: nlgmoe.data.Blend
  init_args:
    parts:
    - {weight: 0.7, name: Books3_ftfy, corpus: {class_path: nlgmoe.data.MegatronIndexed,
       init_args: {prefix: /data/blend/Books3_ftfy_text_document, split: [98, 2, 0]}}}
    - {weight: 0.3, name: Github_ftfy, corpus: {class_path: nlgmoe.data.MegatronIndexed,
       init_args: {prefix: /data/blend/Github_ftfy_text_document, split: [98, 2, 0]}}}
data.max_eval_windows: 1280  # of each part
""")


def words_of_script(folder: Path, variables: dict[str, str]) -> list[str]:
    """Run the script by the lines of docs/coming_from.md, without their last; return the words that it would launch."""
    page = (Path(__file__).parents[2] / "docs/coming_from.md").read_text()
    (lines,) = re.findall(r"```bash\n(.*?)\nbash pretrain.sh", page, re.DOTALL)
    shutil.copy(Path(__file__).with_name("pretrain.sh"), folder)
    others = "ds_ssh() { yes gpu | head -n 66; }; export -f ds_ssh"
    environment = {**os.environ, **variables, "HOSTNAME": "localhost"}
    subprocess.run(["bash", "-c", f"{others}\n{lines}\nbash pretrain.sh"], cwd=folder, env=environment, check=False)
    return shlex.split((folder / "launch.txt").read_text())


@pytest.mark.parametrize(("variables", "expected"), [({}, SETTINGS), ({"USE_BLEND": "true"}, BLEND)])
def test_script_in_the_tutorials_style_is_translated(
    variables: dict[str, str], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of_script(tmp_path, variables)
    monkeypatch.chdir(tmp_path)  # where the script wrote DeepSpeed's configuration
    text = translated(words)
    settings = yaml.safe_load(text)
    settings["trainer"]["default_root_dir"] = settings["trainer"]["default_root_dir"].removeprefix(f"{tmp_path}/")
    assert {path: get(settings, path) for path in expected} == expected
    (tmp_path / "translated.yaml").write_text(text)
    here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
    here["default_root_dir"] = str(tmp_path)
    experiment = load_config(tmp_path / "translated.yaml", **{f"trainer__{name}": here[name] for name in here})
    assert experiment.module.config.vocab_size == 50257
    assert experiment.data.seq_len == experiment.module.config.seq_len


def test_script_is_refused_with_all_reasons_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["from-megatron", "--", *launched("--use-tutel --optimizer sgd --lr nothing")])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2
    assert [line.split(": ")[1] for line in lines] == ["--use-tutel", "--lr nothing", "--optimizer sgd"]
    assert all(line.startswith("error: --") for line in lines)


def test_from_megatron_writes_notes_defaults_and_skipped_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o.yaml"
    launch = ["--", *launched("--no-such-flag 3 --deepspeed")]
    main(["from-megatron", "--skip-unknown", *launch])
    printed, _ = capsys.readouterr()
    main(["from-megatron", "--skip-unknown", "--output", str(output), *launch])
    assert output.read_text() == printed
    assert "exists already; name another file" in error_of(capsys, "from-megatron", "--output", output, *launch)
    assert printed.startswith("# A launch of Megatron-DeepSpeed, translated by")
    assert "# NOT TRANSLATED, unknown: --no-such-flag 3.\n" in printed
    assert "# --deepspeed: the strategy does that.\n" in printed
    assert "    lr: 0.001\n" in printed
    assert "      loss_coeff: 0.1\n" in printed
    assert "# Not given, so Megatron-DeepSpeed's default: " in printed and "--moe-loss-coeff 0.1" in printed
