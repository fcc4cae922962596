# Packages that set their library up before they import it, each in a process of its own.
collect_ignore = ["torch_memory", "xla"]
