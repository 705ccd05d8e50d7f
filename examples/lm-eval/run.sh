#!/usr/bin/env bash
# lm-evaluation-harness on local data, one request at a time and then sixteen: the samples must be the same, bit for bit.
#   examples/lm-eval/run.sh http://127.0.0.1:8000/v1 TOKENIZER        (pip install 'lm-eval[api]')
set -euo pipefail
url=${1:?usage: examples/lm-eval/run.sh http://127.0.0.1:8000/v1 TOKENIZER}
tokenizer=${2:?the model\'s folder or name, for its tokenizer}
cd "$(dirname "$0")"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
model=$(curl -fsS "$url/models" | python3 -c 'import json, sys; print(json.load(sys.stdin)["data"][0]["id"])')
for concurrent in 1 16; do
  lm_eval --model local-completions --include_path . --tasks capitals,continue --log_samples --output_path "$out/$concurrent" \
    --model_args "model=$model,base_url=$url/completions,tokenizer=$tokenizer,num_concurrent=$concurrent,max_retries=1"
done
python3 - "$out" <<'PY'
import json, pathlib, sys

def samples(folder):
    files = sorted(pathlib.Path(folder).rglob("samples_*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    # What the server said, as text of floats: no rounding, no tolerance.
    return {(line["arguments"]["gen_args_0"]["arg_0"], line["doc_id"]): repr(line["resps"]) for line in lines}

for file in pathlib.Path(f"{sys.argv[1]}/1").rglob("results_*.json"):
    for task, scores in json.loads(file.read_text())["results"].items():
        print(task, {name: score for name, score in scores.items() if isinstance(score, float)})
alone, crowded = (samples(f"{sys.argv[1]}/{concurrent}") for concurrent in (1, 16))
differ = sum(alone[key] != crowded[key] for key in alone)
print(f"{len(alone)} samples with 1 and with 16 requests at a time: {differ} differ")
sys.exit(not alone or alone.keys() != crowded.keys() or differ > 0)
PY
