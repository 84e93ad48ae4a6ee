"""What a Ray that is started here is told, by `ray.init` or by `ray start` (head.py); to be set before Ray is imported."""

import os

OBJECT_STORE_BYTES = 128 << 20
LEAST_CPUS = 16
ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray runs its workers at nice 15; a step waits for the slowest slot, so here they are not niced.
    "RAY_worker_niceness": "0",
    # A worker for each logical CPU, 16 where there are two, before anyone asks for one.
    "RAY_prestart_worker_first_driver": "0",
    # The raylet is there before its own object store listens, and tries again after a second; 10 s in all, as usual.
    "RAY_raylet_client_connect_timeout_milliseconds": "20",
    "RAY_raylet_client_num_connect_attempts": "500",
}


def set_environment() -> None:
    """Set what Ray's processes read from their environment; what the user has set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def local_cpus(wanted: float) -> int:
    """Logical CPUs of a local Ray: slots share those of the machine on purpose, and a run must be able to grow."""
    return max(LEAST_CPUS, round(2 * wanted + 0.5))
