"""Hardware by name: the public functions of device profiles, clusters and their sanity checks."""

from planner.specs.cluster_file import list_clusters, load_cluster
from planner.specs.device_file import list_devices, load_device
from planner.specs.hardware_check import check_hardware

__all__ = ["check_hardware", "list_clusters", "list_devices", "load_cluster", "load_device"]
