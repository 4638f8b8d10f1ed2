"""The dialect: what a script would launch, worked out without running it."""

from pathlib import Path

import pytest

from nlgmoe.tools.megatron.script import read_launch
from nlgmoe.tools.megatron.tokens import ScriptError


def launched(script: str, **variables: str) -> list[str]:
    """The words after the entry point; what is unknown is written as its variable."""
    launch, expander = read_launch(script, variables)
    return [expander.readable(word.text) for word in launch.arguments]


def value_of(lines: str, name: str = "X", **variables: str) -> str:
    return " ".join(launched(f"{lines}\npython pretrain_gpt.py ${name}\n", **variables))


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        ("X=5", "5"),
        ("X='$Y'  # a comment", "$Y"),
        ('Y=a; X="${Y}b $Y"', "ab a"),
        ('X="a \\\n   b"', "a b"),
        ("X=a#b", "a#b"),
        ("X=${Y:-7}", "7"),
        ("Y=; X=${Y:-7}${Y-8}", "7"),
        ("Y=1; X=${Y:+on}", "on"),
        (": ${X:=3}", "3"),
        ("X=a; X+=b", "ab"),
        ('A=(1 2); A+=(3); X="${A[@]}"', "1 2 3"),
        ("A=(1 2); X=${A[1]}", "2"),
        ("Y=7; X=$((Y * (2 + 3) / 4))", "8"),
        ("X=$(( -7 / 2 ))", "-3"),
        ("X=$(( 7 % 4 ** 1 ))", "3"),
        ("X=$((3 > 2 && 1 == 0))", "0"),
        ("X=`pwd`/out", "./out"),
        ("X=1; (X=2)", "1"),
        ("f() { X=$1; }; f 4", "4"),
        ("for X in 1 2 3; do :; done", "3"),
        ("X=1\ncat <<'EOF' > file\nX=2\nEOF\n", "1"),
        ("declare X=9", "9"),
        ("X=1; unset X; X=${X:-2}", "2"),
    ],
)
def test_values(lines: str, value: str) -> None:
    assert value_of(lines) == value


@pytest.mark.parametrize(
    ("test", "holds"),
    [
        ('[ "$A" = "true" ]', True),
        ('[ "$A" == true ]', True),
        ('[[ $A != "true" ]]', False),
        ("[[ $A == tr* ]]", True),
        ("[[ $N -gt 1 && $N -le 4 ]]", True),
        ("[ $N -lt 1 -o $N -ge 4 ]", True),
        ("[[ ! ( $N -eq 4 || $A == x ) ]]", False),
        ('[ -z "$EMPTY" ]', True),
        ('[ -n "$EMPTY" ]', False),
        ("(( N == 4 ))", True),
        ("[ $N -ne 4 ] || [ $N -eq 4 ]", True),
        ("! true", False),
        ("false", False),
    ],
)
def test_conditions(test: str, holds: bool) -> None:
    lines = f"A=true; N=4; EMPTY=\nif {test}; then X=yes; else X=no; fi"
    assert value_of(lines) == ("yes" if holds else "no")


@pytest.mark.parametrize(
    ("lines", "root"),
    [
        ("X=$(hostname)", "X"),
        ("Y=$(nvidia-smi | wc -l); X=$((Y * 2))", "Y"),
        ("X=$HOSTNAME", "HOSTNAME"),
        ("Y=$(date); if [ $Y -gt 1 ]; then X=1; else X=2; fi", "Y"),
        ("X=1; if [ -f file ]; then X=2; fi", "X"),
        ("X=1; if [ -f file ]; then :; else X=2; fi", "X"),
        ("X=1; while true; do X=2; done", "X"),
        ("X=1; for f in *.txt $(ls); do X=$f; done", "X"),
        ("read X", "X"),
        ("X=1; ((X++))", "X"),
        ("Y=$(date); [ $Y == 1 ] && X=3", "Y"),
        ("X=${Y%.sh}", "X"),
    ],
)
def test_what_the_text_does_not_tell_is_unknown_and_named_by_its_root(lines: str, root: str) -> None:
    launch, expander = read_launch(f"{lines}\npython pretrain_gpt.py $X")
    unknown = expander.first_unknown(launch.arguments[0].text)
    assert unknown is not None and unknown.name == root
    given = launched(f"{lines}\npython pretrain_gpt.py $X", **{root: "1"})
    assert not any("$" in word or "?" in word for word in given)


def test_an_empty_string_is_a_word_and_an_empty_list_is_none() -> None:
    assert launched('A=()\nE=\npython pretrain_gpt.py "$@" $E "${A[@]}" "$E" last') == ["", "last"]


def test_a_here_document_is_expanded_unless_its_delimiter_is_quoted() -> None:
    launch, _ = read_launch("S=2\ncat <<E > a\n$S\nE\ncat <<'E' > b\n$S\nE\npython pretrain_gpt.py")
    assert {path: given.value for path, given in launch.documents.items()} == {"a": "2\n", "b": "$S\n"}


def test_every_flag_knows_the_line_it_was_written_on() -> None:
    script = (
        'A=" \\\n --one 1 \\\n --two"\nA="$A \\\n --three"\nC="deepspeed pretrain_gpt.py $A --four &> log"\neval $C'
    )
    launch, _ = read_launch(script)
    lines = {word.text: word.line for word in launch.arguments if word.text.startswith("-")}
    assert lines == {"--one": 2, "--two": 3, "--three": 5, "--four": 6}
    assert launch.line == 7 and launch.arguments[-1].text == "--four"


def test_nothing_is_run(tmp_path: Path) -> None:
    victim, witness = tmp_path / "victim", tmp_path / "witness"
    victim.write_text("alive")
    script = f"""
rm -rf {victim}
touch {witness}
X=$(touch {witness}; echo 1)
Y=`touch {witness}`
echo hello > {witness}
cat <<EOF > {witness}
text $(touch {witness})
EOF
if touch {witness}; then Z=1; fi
[ -f $(touch {witness}) ] && Z=2
for i in 1 2; do rm -rf {victim}; done
eval "touch {witness}"
python pretrain_gpt.py --num-layers $(touch {witness}) > {witness}
"""
    read_launch(script)
    assert victim.read_text() == "alive" and not witness.exists()


@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        ("X=1\nif [ $X = 1 ]; then\n", 3, "expected `fi` for line 2"),
        ('X=1\nY="abc', 2, "is never closed"),
        ("X=1\ncat <<EOF\nabc", 2, "here-document never ends"),
        ("case $X in a) Y=1;; esac", 1, "`case` is not read here"),
        ("\nsource config.sh\npython pretrain_gpt.py", 2, "`source config.sh` is not read here; put its assignments"),
        ("shift\npython pretrain_gpt.py", 1, "`shift` is not read here"),
        ("if [ $A = ]; then X=1; fi\npython pretrain_gpt.py", 1, "the test `$A =` is not understood"),
        ("echo python pretrain_gpt.py", 1, "nothing launches pretrain_gpt.py"),
        ("exit 0\npython pretrain_gpt.py", 1, "the script ends here"),
        ("python pretrain_gpt.py\npython pretrain_gpt.py", 2, "a second launch after line 1"),
        ("bash -c 'python pretrain_gpt.py --lr 1'", 1, "launch pretrain_gpt.py with deepspeed"),
        ("X=$(date)\nif [ $X = 1 ]; then\npython pretrain_gpt.py\nfi", 3, "depends on the output of `date` (line 1)"),
    ],
)
def test_lines_that_are_not_understood_are_errors(script: str, line: int, message: str) -> None:
    with pytest.raises(ScriptError) as error:
        read_launch(script)
    assert message in str(error.value) and error.value.line == line


def test_a_given_variable_must_be_in_the_script() -> None:
    with pytest.raises(ScriptError, match="no variable NUM_GPU in the script"):
        launched("NUM_GPUS=1\npython pretrain_gpt.py", NUM_GPU="2")
