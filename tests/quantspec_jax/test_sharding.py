"""Placement on a mesh: 8 devices of the host in a process of its own, and the one of today."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import pytest
import sharded

from quantspec_jax import sharding
from quantspec_jax.models.parameters import flatten


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    """What went wrong in each check of sharded.py."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    call = [sys.executable, sharded.__file__]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("check", [check.__name__ for check in sharded.CHECKS])
def test_eight_devices(found, check):
    assert found[check] == "", found[check]


def test_on_one_device_arrays_are_those_of_no_mesh():
    """Programs are compiled for where arrays lie: they must not tell the two apart."""
    model = sharded.model()
    mesh = sharding.mesh_of(model.params)
    assert mesh == sharding.one_device()
    placed = sharding.place_model(model, mesh)
    for path, x in flatten(model.params).items():
        assert flatten(placed.params)[path] is x
    where = sharding.param_shardings(model.config, model.params, mesh)
    only = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert set(jax.tree.leaves(where)) == {only}
