# What the scripts beside it know of their entrants: which engines of antumbra's software CPU there are, how an entrant is named,
# and how its time is read. Sourced, not run. An entrant of antumbra's is "MMU", with the program's own choice of engine, or
# "MMU-ENGINE"; or "direct-WHERE", the host's processor under shadow tables, with user code where that says.

# Prints the engines that the program $1 can be asked for, one a line; nothing if it cannot be asked.
engines_offered() {
    local help
    help=$("$1" run --help)
    case $help in *' --engine '*) printf '%s\n' interpret translate ;; esac
}

# Prints the engine that the program $1 chooses by itself.
engine_by_default() {
    "$1" run --help | awk '
        / --engine / { here = 1 }
        here && match($0, /\[default: [a-z]+\]/) { name = substr($0, RSTART + 10, RLENGTH - 11); exit }
        END { print name == "translate" ? name : "interpret" }'
}

# Prints the entrants, one a line, of the program $1 for the MMUs $2 and the engines $3 (lists with commas). Engines: "" is the
# program's own choice, "all" is whatever it offers. A program that cannot be asked is the interpreter.
antumbra_entrants() {
    local offered engines mmu engine
    offered=$(engines_offered "$1")
    case $3 in
        '') engines='' ;;
        all) engines=${offered:-interpret} ;;
        *)
            engines=${3//,/ }
            for engine in $engines; do
                grep -qxF -- "$engine" <<<"${offered:-interpret}" || {
                    echo "$1 has no engine '$engine', only:" ${offered:-interpret} >&2
                    return 1
                }
            done ;;
    esac
    for mmu in ${2//,/ }; do
        [ -n "$engines" ] || printf '%s\n' "$mmu"
        for engine in $engines; do printf '%s-%s\n' "$mmu" "$engine"; done
    done
}

# Prints the entrants of direct execution, one a line, for the list with commas $1 of places for user code.
direct_entrants() {
    local place
    for place in ${1//,/ }; do
        case $place in
            auto | native | translate) printf 'direct-%s\n' "$place" ;;
            *) echo "--direct takes auto, native and translate, and not '$place'" >&2; return 1 ;;
        esac
    done
}

# Prints the options by which the program $1 is told to be the entrant $2, one word a line.
entrant_options() {
    case $2 in
        direct-*) printf '%s\n' --cpu kvm --mmu shadow --user-code "${2#*-}" ;;
        *)
            printf '%s\n' --cpu soft --mmu "${2%%-*}"
            case $2 in *-*) [ -z "$(engines_offered "$1")" ] || printf '%s\n' --engine "${2#*-}" ;; esac ;;
    esac
}

# Runs a command with a limit of $1 seconds. The first line that comes out says which process it is: "entrant process N".
with_limit() {
    # The words are for the inner shell, which becomes the command.
    # shellcheck disable=SC2016
    timeout "$1" bash -c 'printf "entrant process %s\n" "$$"; exec "$@"' with_limit "${@:2}" </dev/null
}

# Sets `stamp` to the time in nanoseconds by the clock $1: wall, or cpu: what all threads of the process $2 have had of the
# host's processors. It is a variable because a subshell would take longer than what is measured may be wrong by.
# The second is what a busy host can be measured by: it knows no waiting for a processor, only for caches and memory.
stamp=0
read_stamp() {
    local account ran
    stamp=${EPOCHREALTIME/./}000
    [ "$1" = cpu ] || return 0
    stamp=0
    for account in "/proc/$2/task/"*/schedstat; do
        if read -r ran _ <"$account"; then stamp=$((stamp + ran)); fi
    done 2>/dev/null
}
