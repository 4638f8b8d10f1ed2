# shellcheck shell=bash
# Read by every bash of `from-megatron --run-script` before its script (BASH_ENV). Commands are recorded in place of being run,
# but for bash's own and those of PATH. The environment has FROM_MEGATRON: a folder with work/ (the script's folder), bin/ (PATH),
# guarded/ (commands that may write inside work/) and records/.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || exit 99 # `local -`

_record() { # one file for each command; its fields end with NUL
    local captured=
    [[ -p /dev/stdout ]] && captured=1
    printf '%s\0' "$captured" "${NUM_GPUS-}" "${NUM_GPUS_PERNODE-}" "${ZERO_STAGE-}" "$(compgen -v)" "$@" \
        >"$("$FROM_MEGATRON/guarded/mktemp" "$FROM_MEGATRON/records/XXXXXXXXXX")"
}

command_not_found_handle() { _record "$@"; }

for _name in deepspeed torchrun python python3 srun mpirun mpiexec nohup kill cd pushd popd; do
    eval "$_name() { _record $_name \"\$@\"; }"
done

_is_inside() { [[ $("$FROM_MEGATRON/guarded/realpath" -m -- "$1") == "$FROM_MEGATRON"/work/* ]]; }

_guarded() {
    local _word
    for _word in "${@:2}"; do
        [[ $_word == -* ]] || _is_inside "$_word" || { _record "$@"; return; }
    done
    "$FROM_MEGATRON/guarded/$1" "${@:2}"
}

for _name in mkdir cp touch tee; do
    eval "$_name() { _guarded $_name \"\$@\"; }"
done

sed() { # its substitutions are read from the record where the template is not there
    _record sed "$@"
    case " $*" in
        *" -i"* | *" --in-place"*) _guarded sed "$@" ;;
        *) "$FROM_MEGATRON/guarded/sed" "$@" || true ;;
    esac
}

source() { if _is_inside "$1" && [[ -f $1 ]]; then builtin source "$@"; else _record source "$@"; fi; }
# shellcheck source=/dev/null
.() { source "$@"; }
exec() { (($#)) || return 0; "$@"; exit; }
hostname() { echo localhost; }

_before_each_command() { # its arguments are the script's or function's, for the `eval` below
    local -
    set +eu
    eval "$FROM_MEGATRON_VARIABLES"
    PATH=$FROM_MEGATRON/bin
    local _rest=$BASH_COMMAND _word
    while [[ $_rest =~ ^[A-Za-z_][A-Za-z0-9_]*\+?=[^[:space:]]*[[:space:]]+(.*)$ ]]; do _rest=${BASH_REMATCH[1]}; done
    _word=${_rest%%[[:space:]]*}
    if [[ $_word == *[/\$]* && $_word != *[\`\(\;\&\|\<\>=]* ]]; then
        eval "_word=$_word" 2>/dev/null
        _word=${_word%%[[:space:]]*}
        [[ $_word =~ ^[A-Za-z0-9_.+-]*/[A-Za-z0-9_./+-]*$ && $_word != "$FROM_MEGATRON"/guarded/* ]] || return 0
        _is_inside "$_word" && [[ -f $_word ]] || eval "function $_word { _record $_word \"\$@\"; }"
    fi
}

set -o functrace
trap '_before_each_command "$@"' DEBUG
