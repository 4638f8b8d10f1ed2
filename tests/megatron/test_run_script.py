"""A script that is run has its commands recorded, and what it launches is found in all ways of launching."""

import subprocess
import time
from pathlib import Path

import pytest

from nlgmoe.tools.megatron import run_script as module
from nlgmoe.tools.megatron.launch import Launch
from nlgmoe.tools.megatron.run_script import run_script


def run(folder: Path, text: str, **variables: str) -> Launch:
    script = folder / "run.sh"
    script.write_text(text)
    return run_script(script, variables)


def test_nothing_outside_the_folder_is_changed(tmp_path: Path) -> None:
    script, victim, witness = tmp_path / "script", tmp_path / "victim", tmp_path / "witness"
    script.mkdir()
    victim.mkdir()
    (victim / "file").write_text("alive")
    (tmp_path / "other.sh").write_text(f"touch() {{ :; }}; echo sourced > {witness}")
    launch = run(
        script,
        f"""
export PATH=/bin:/usr/bin:$PATH HOME={tmp_path}
rm -rf $HOME/x {victim}
/bin/rm -rf {victim}
RM=/bin/rm
$RM -rf {victim}
"$RM" -rf {victim} | cat
(cd {tmp_path} && rm -rf victim)
bash -c '/bin/rm -rf {victim}; rm -rf {victim}'
eval "rm -rf {victim}"
sed -i s/alive/dead/ {victim}/file
X=$(touch {witness}; /bin/touch {witness}; curl http://localhost/ | tee {witness})
mkdir {witness}
cp {victim}/file {witness}
source {tmp_path}/other.sh
. {tmp_path}/other.sh
cd {tmp_path}
echo relative > witness
kill -9 $$
sudo rm -rf {victim}
frobnicate --now || exit 1
set -euo pipefail
frobnicate 2> {tmp_path}/redirected
mkdir -p out/log; touch out/log/x; [ -f out/log/x ]
exec torchrun --nproc_per_node 2 pretrain_gpt.py --lr 1
""",
    )
    assert launch.launcher[0] == "torchrun" and launch.flags == ["--lr", "1"]
    assert (victim / "file").read_text() == "alive" and not witness.exists()
    assert {file.name for file in script.iterdir()} == {"run.sh"}
    assert (tmp_path / "redirected").exists()  # what the announcement says is not prevented


@pytest.mark.parametrize(
    ("launching", "launcher"),
    [
        ("deepspeed --num_gpus 4 ../../pretrain_gpt.py $FLAGS &> log &", "deepspeed --num_gpus 4"),
        ('CMD="deepspeed pretrain_gpt.py $FLAGS &> log"; eval $CMD', "deepspeed"),
        (
            "command -v torchrun > log && torchrun --nnodes=2 pretrain_gpt.py $FLAGS 2>&1 | tee log",
            "torchrun --nnodes=2",
        ),
        ('R="/no/bin/python3 -u"; $R pretrain_gpt_moe.py $FLAGS', "/no/bin/python3 -u"),
        ('srun -N 2 bash -c "torchrun /x/pretrain_gpt.py $FLAGS"', "srun -N 2 bash -c torchrun"),
        ('srun -N 2 bash -c "torchrun pretrain_gpt.py $FLAGS"', "srun -N 2 bash -c torchrun"),
        ("nohup numactl -N 0 python pretrain_gpt.py $FLAGS &", "nohup numactl -N 0 python"),
        ("f() { $1 pretrain_gpt.py $FLAGS; }; f mpirun", "mpirun"),
        (
            "echo '$0 pretrain_gpt.py $FLAGS' > l.sh; cp pretrain_gpt.py x; bash -c 'srun pretrain_gpt.py --a 1 --b'",
            "srun",
        ),
    ],
)
def test_ways_to_launch(launching: str, launcher: str, tmp_path: Path) -> None:
    launch = run(tmp_path, f'FLAGS="--a 1 \\\n --b"\n{launching}\n')
    assert (" ".join(launch.launcher), launch.flags) == (launcher, ["--a", "1", "--b"])


def test_given_variables_win_and_empty_ones_and_missing_files_are_named(tmp_path: Path) -> None:
    text = """
# $COMMENT
GPUS=8; local_size() { local GPUS=2; X=$GPUS; }; local_size
RATE=$(compute | wc -l); NAME=$(date | wc -l)
source conf/small.env; . $NOTHING; source ''; SEED=$(cat seed.txt)
for node in 1 2; do :; done
deepspeed pretrain_gpt.py --gpus $GPUS $X --node $node ${DEFAULT:-5} --empty $SLURM_NNODES "${MORE}" --quoted "a  b"
"""
    launch = run(tmp_path, text, GPUS="64", NUM_GPUS="64")
    assert launch.flags == ["--gpus", "64", "64", "--node", "2", "5", "--empty", "", "--quoted", "a  b"]
    assert launch.variables["NUM_GPUS"] == "64"
    assert launch.notes == [
        "Empty in this run: $MORE, $NOTHING, $SLURM_NNODES, the output of compute. Give values with --variables.NAME VALUE.",
        "Not read in this run: conf/small.env, seed.txt. Put what the script needs beside it, as a .sh or .json file.",
    ]


def test_the_deepspeed_configuration_is_the_file_that_the_script_makes(tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text('{"stage": ZERO_STAGE}')
    (tmp_path / "stage.sh").write_text("ZERO_STAGE=2")
    text = """
. ./stage.sh
sed "s/ZERO_STAGE/$ZERO_STAGE/" template.json > $PWD/c.json
deepspeed pretrain_gpt.py --deepspeed_config $PWD/c.json --save $PWD/out
"""
    launch = run(tmp_path, text)
    assert launch.deepspeed_config == '{"stage": 2}' and launch.variables["ZERO_STAGE"] == "2"
    assert launch.flags == ["--deepspeed_config", "./c.json", "--save", "./out"]
    absent = run(tmp_path, text.replace("template.json", "absent.json"))
    assert absent.deepspeed_config is None and absent.substitutions == {"ZERO_STAGE": "2"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "echo python pretrain_gpt.py --lr 1",
            "run.sh: nothing launches pretrain_gpt.py; give the script that calls it",
        ),
        ("X=1\nif [ $X = 1 ]; then\n", r"\(bash: run.sh: line 3: syntax error: unexpected end of file"),
        ("python pretrain_gpt.py --lr 1\npython pretrain_gpt.py --lr 2", "launches pretrain_gpt.py 2 times"),
        ('srun bash -c "python pretrain_gpt.py --lr \'1"', "is not one .No closing quotation.; correct its quotes"),
        ("while true; do date > FOLDER/beat; done &", "the script ran longer than 1 s and was ended"),
    ],
)
def test_a_script_without_one_launch_is_an_error(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIME_LIMIT", 1.0)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, text.replace("FOLDER", str(tmp_path)))
    (tmp_path / "beat").unlink(missing_ok=True)
    time.sleep(0.1)
    assert not (tmp_path / "beat").exists()  # no process is left in the background


def test_a_given_variable_must_be_in_the_script_and_bash_must_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no variable GPU in run"):
        run(tmp_path, "GPUS=1", GPU="2")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(
        ValueError, match="--run-script needs bash, which is not in PATH; install it, or give the flags"
    ):
        run(tmp_path, "")
