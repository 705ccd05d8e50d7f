#!/usr/bin/env bash
# With curl: what the server promises, then one request with a receipt, asked twice. Exit status 0: the same bits.
#   examples/ask.sh http://127.0.0.1:8000/v1
set -euo pipefail
url=${1:?usage: examples/ask.sh http://127.0.0.1:8000/v1}
root=${url%/v1}
curl -fsS "$root/deterministic" | python3 -c 'import json, sys; print(json.load(sys.stdin)["fingerprint"])'
model=$(curl -fsS "$url/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
ask() {
  curl -fsS "$url/completions" -H 'Content-Type: application/json' -d '{
    "model": "'"$model"'", "prompt": "The sea", "max_tokens": 24, "temperature": 0.8,
    "deterministic": {"require": true, "receipt": true}
  }'
}
# A choice's digest is over every token id and every logprob's bits.
digest() { python3 -c 'import json, sys; print(json.load(sys.stdin)["deterministic"]["receipt"]["choices"][0]["digest"])'; }
first=$(ask | digest)
second=$(ask | digest)
echo "$first"
echo "$second"
[ "$first" = "$second" ]
