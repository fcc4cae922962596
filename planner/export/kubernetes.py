"""A launch under Kubernetes: a JobSet of one indexed job, a pod per node.

Fields are those of ``jobset.x-k8s.io/v1alpha2`` and ``batch/v1``. Pods find the first one under the name that JobSet gives it,
``<jobset>-<job>-0-0.<jobset>``.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.errors import ExportError, Problem
from planner.export.target import Target, summary

__all__ = ["kubernetes_files"]

_RESOURCES = {"NVIDIA": "nvidia.com/gpu", "AMD": "amd.com/gpu", "Intel": "habana.ai/gaudi"}
"""Resource names of the vendors' device plugins."""


def kubernetes_files(target: Target, image: str) -> Mapping[str, str]:
    """``jobset.yaml``; the folder's files reach the pods as a ConfigMap.

    Args:
        target: the plan.
        image: container image that holds the launcher.

    Raises:
        ExportError: no device plugin is known for the devices.
    """
    vendor, (nodes, per_node) = target.cluster.device.vendor, target.nodes()
    if vendor not in _RESOURCES:
        found = f"no device plugin is known for devices of {vendor}"
        raise ExportError(Problem("--with kubernetes", found, f"devices of {', '.join(_RESOURCES)}"))
    name = f"plan-{target.plan.id}"
    head = [f"# {line}" for line in summary(target.plan)]
    text = _JOBSET.format(name=name, nodes=nodes, per_node=per_node, resource=_RESOURCES[vendor], image=image)
    return {"jobset.yaml": "\n".join([*head, text])}


_JOBSET = """\
# kubectl create configmap {name} --from-file=. && kubectl apply -f jobset.yaml
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
spec:
  failurePolicy:
    maxRestarts: 0
  network:
    enableDNSHostnames: true
  replicatedJobs:
    - name: node
      replicas: 1
      template:
        spec:
          parallelism: {nodes}
          completions: {nodes}
          completionMode: Indexed
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              containers:
                - name: train
                  image: {image}
                  # A ConfigMap cannot be written, and launchers write beside their configuration.
                  command: ["bash", "-c", "cp -rL /plan /tmp/plan && cd /tmp/plan && NODE_RANK=$JOB_COMPLETION_INDEX bash run.sh"]
                  env:
                    - name: MASTER_ADDR
                      value: {name}-node-0-0.{name}
                    - name: MASTER_PORT
                      value: "29500"
                  resources:
                    limits:
                      {resource}: "{per_node}"
                  volumeMounts:
                    - name: plan
                      mountPath: /plan
                    - name: shared-memory
                      mountPath: /dev/shm
              volumes:
                - name: plan
                  configMap:
                    name: {name}
                - name: shared-memory
                  emptyDir:
                    medium: Memory
"""
