#!/bin/bash
# Whether a guest runs here at all, and whether its kernel can make devices.
read -r _ _ version _ </proc/version
for module in rxe siw; do
  grep -qw "${module}_newlink" /proc/kallsyms || { echo "the guest's kernel, Linux $version, lacks $module"; exit 1; }
done
echo "Linux $version with rxe and siw"
