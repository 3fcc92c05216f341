#!/usr/bin/env bash
# What takes too long for every change: the sweeps of foreign programs with many iterations, and the figures against rxe and UDP.
. "$(dirname "$0")/lib.sh"
bash ci/foreign.sh --long
bash ci/foreign-figures.sh
