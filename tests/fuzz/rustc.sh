#!/usr/bin/env bash
# Cargo calls this in rustc's place for the crates of this workspace: a counter at every branch, an eye on every comparison.
# Only for them: with the branches of the TOML parser and the like among the new ones, few inputs got as far as ours.
exec "$@" -Cdebug-assertions -Coverflow-checks -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-{level=4,inline-8bit-counters,pc-table,trace-compares}
