"""What decides: scheduler, generations, the workloads; configuration, and Ray."""
