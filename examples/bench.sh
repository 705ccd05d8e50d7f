#!/usr/bin/env bash
# vLLM's own load generator: what a server with --deterministic delivers. Run it against a server without the flag too, and compare.
#   examples/bench.sh http://127.0.0.1:8000/v1 [options of `vllm bench serve`]
set -euo pipefail
url=${1:?usage: examples/bench.sh http://127.0.0.1:8000/v1}
shift
model=$(curl -fsS "$url/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
exec vllm bench serve --backend openai --base-url "${url%/v1}" --model "$model" --dataset-name random --random-input-len 64 \
  --random-output-len 32 --num-prompts 32 --max-concurrency 8 --ignore-eos --seed 0 "$@"
