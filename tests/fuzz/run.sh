#!/usr/bin/env bash
# Runs a fuzz target that `make` built: tests/fuzz/run.sh TARGET SECONDS [CORPUS]
#
# It begins with the seeds that are named below, always in the same order. What reaches new branches is kept in CORPUS, or
# forgotten. What breaks the target is kept in out/fuzz, with the whole log, and is an error.
set -euo pipefail
cd "$(dirname "$0")/../.."

(($# == 2 || $# == 3)) || {
    echo 'usage: tests/fuzz/run.sh TARGET SECONDS [CORPUS]' >&2
    exit 2
}
readonly target=$1 seconds=$2 program=out/bin/fuzz-$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
corpus=${3:-$scratch/corpus}
mkdir -p out/fuzz "$corpus"

shopt -s nullglob
seeds=()
# Bytes of an input at most: what a text that uses everything needs.
length=1024
case $target in
manifest)
    seeds=(runtime/manifest/tests/{wrong,right}/*.zgraph.toml examples/*.zgraph.toml "$scratch/documented")
    # The page's example has every key. Its comments are words in which nothing is found.
    awk '/^```$/ && on { exit } on { print } /^```toml$/ { on = 1 }' docs/manifest.md | sed 's/ *#.*//' >"$scratch/documented"
    ;;
settings) seeds=(examples/gaia.toml) ;;
allow | sites) length=320 ;;
answers | store) length=512 ;;
files) length=4096 ;;
esac
# Words that are put into inputs, where it is words that they are made of.
words=()
[[ ! -e tests/fuzz/$target.dict ]] || words=("-dict=tests/fuzz/$target.dict")

begin=()
((${#seeds[@]} == 0)) || begin=("-seed_inputs=$(IFS=,; echo "${seeds[*]}")")

readonly log=out/fuzz/$target.log
rm -f "out/fuzz/$target-"*
# A target takes microseconds: five seconds are a loop, and a gigabyte is a leak.
if "$program" -seed=1 -mutate_depth=2 -max_total_time="$seconds" -max_len="$length" -timeout=5 -rss_limit_mb=1024 -print_final_stats=1 \
    -artifact_prefix="out/fuzz/$target-" "${words[@]}" "${begin[@]}" "$corpus" &>"$log"; then
    covered=$(grep -oE 'cov: [0-9]+' "$log" | tail -n 1)
    printf 'fuzz: %-8s %8d inputs, %5d branches\n' "$target" \
        "$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")" "${covered#cov: }"
    exit 0
fi
grep -E -A 2 'panicked at|ERROR: libFuzzer|No such file' "$log" | cut -c 1-400 | tail -n 20 >&2 || tail -n 20 "$log" >&2
for input in "out/fuzz/$target-"*; do
    [[ -e $input ]] || continue
    {
        printf 'fuzz: %s broke on %s, %d bytes:\n' "$target" "$input" "$(stat -c %s "$input")"
        head -c 1000 "$input"
        printf '\nfuzz: again:   %s %s\nfuzz: smaller: %s -minimize_crash=1 -max_total_time=60 -exact_artifact_path=%s.min %s\n' \
            "$program" "$input" "$program" "$input" "$input"
    } >&2
done
echo "fuzz: the whole log is $log" >&2
exit 1
