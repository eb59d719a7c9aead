"""Runs jobs of Snakemake as Jobs of Kubernetes, on a volume that all pods share.

job.py submit GPUS MEMORY_MB SCRIPT   prints the name of the Job
job.py status NAME                    prints running, success or failed
job.py cancel NAME ...

From the environment: MODNB_IMAGE (with the checkout and its environment at the paths from which `modnb run` is given),
MODNB_CLAIM (of the shared volume), MODNB_SHARED (where it is mounted), MODNB_NAMESPACE (the context's), MODNB_DATA.
"""

import json
import os
import subprocess
import sys


def setting(name: str) -> str:
    "A variable of the environment that has to be there"
    if value := os.environ.get(name): return value
    about = __doc__.rpartition("\n\n")[2]
    sys.exit(f"{name} is not set. {about}")


def manifest(gpus: int, memory: int, script: str) -> dict:
    "A Job that runs a script once: a second attempt is for Snakemake to make"
    limits = {"memory": f"{memory}Mi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    variables = [{"name": name, "value": os.environ[name]} for name in ("MODNB_DATA", "OMP_NUM_THREADS")
                 if name in os.environ]
    container = {"name": "modnb", "image": setting("MODNB_IMAGE"), "command": ["bash", script], "env": variables,
                 "resources": {"limits": limits},
                 "volumeMounts": [{"name": "runs", "mountPath": setting("MODNB_SHARED")}]}
    volume = {"name": "runs", "persistentVolumeClaim": {"claimName": setting("MODNB_CLAIM")}}
    pod = {"restartPolicy": "Never", "containers": [container], "volumes": [volume]}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"generateName": "modnb-"},
            "spec": {"backoffLimit": 0, "ttlSecondsAfterFinished": 86_400, "template": {"spec": pod}}}


def kubectl(*words: str, given: str | None = None) -> str:
    "What kubectl prints; its own message and exit code where it fails"
    namespace = ["--namespace", os.environ["MODNB_NAMESPACE"]] if os.environ.get("MODNB_NAMESPACE") else []
    ran = subprocess.run(["kubectl", *namespace, *words], input=given, stdout=subprocess.PIPE, text=True)
    if ran.returncode: sys.exit(ran.returncode)
    return ran.stdout.strip()


def state(job: dict) -> str:
    "running, success or failed"
    status = job.get("status", {})
    ended = {condition["type"] for condition in status.get("conditions", []) if condition.get("status") == "True"}
    if status.get("succeeded") or "Complete" in ended: return "success"
    return "failed" if status.get("failed") or "Failed" in ended else "running"


def main(words: list[str]) -> None:
    match words:
        case ["submit", gpus, memory, script]:
            wanted = json.dumps(manifest(int(gpus), int(memory), os.path.abspath(script)))
            print(kubectl("create", "-f", "-", "-o", "jsonpath={.metadata.name}", given=wanted))
        case ["status", name]:
            found = kubectl("get", "job", name, "--ignore-not-found", "-o", "json")
            print(state(json.loads(found)) if found else "failed")  # somebody has deleted it
        case ["cancel", *names] if names: kubectl("delete", "job", "--ignore-not-found", *names)
        case _: sys.exit(__doc__)


if __name__ == "__main__": main(sys.argv[1:])
