# What the scripts beside it know of antumbra's entrants: which engines of the software CPU there are, and how an entrant is
# named. Sourced, not run. An entrant is "MMU", with the program's own choice of engine, or "MMU-ENGINE".

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

# Prints the options by which the program $1 is told to be the entrant $2, one word a line.
entrant_options() {
    printf '%s\n' --mmu "${2%%-*}"
    case $2 in *-*) [ -z "$(engines_offered "$1")" ] || printf '%s\n' --engine "${2#*-}" ;; esac
}
