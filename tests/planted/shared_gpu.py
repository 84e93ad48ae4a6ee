"""SPARSERAY_TEST_GPUS slots find a GPU each, and all have the first of this machine: each in its turn, slow, but all of it is run."""

import os
from dataclasses import replace
from typing import Any

from loading import when_loaded

_GPUS = int(os.environ.get("SPARSERAY_TEST_GPUS", "0"))


def _change_driver(module: Any) -> None:
    found = module.driver

    def driver() -> Any:
        told = found()
        return replace(told, gpus=told.gpus[:1] * _GPUS)

    module.driver = driver


def _change_ray(module: Any) -> None:
    module.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators = staticmethod(lambda: _GPUS)


def _change_warming(module: Any) -> None:
    module.gpus_here = lambda: _GPUS


if _GPUS:
    os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    when_loaded("sparseray.platform.gpu", _change_driver)
    when_loaded("ray._private.accelerators.nvidia_gpu", _change_ray)
    when_loaded("sparseray.platform.fleet.warming", _change_warming)
