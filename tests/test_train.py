"""State, step and loop: one image set, any number of devices and kinds of compilation."""

import json
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec
from small import FROZEN, KEY, OBJECTIVE, SGD, Dense, Small, batch_of, close, plan_of, same, source_of, state_of

from jaxsd import models, objectives, train
from jaxsd.errors import RunError, UserError
from jaxsd.models.forward import forward
from jaxsd.stage import data_of
from jaxsd.train import loop, optimiser
from jaxsd.train.checkpoint import Checkpoints
from jaxsd.train.state import carry, create, merge, partition
from jaxsd.views.augment import flip_horizontal
from jaxsd.workdir import Journal

# the step


def test_jit_is_plain():
    tx, batch, objective = optax.adam(0.1), batch_of(4), objectives.rotation(Dense(4))
    state = state_of(objective, tx)
    step = train.make_train_step(objective, tx, flip_horizontal())
    plain, jitted = step(state, batch), jax.jit(step)(state, batch)
    close(plain, jitted)
    assert int(jitted[0].step) == 1 and int(state.step) == 0
    same(jax.jit(step)(state, batch), jitted)  # nothing hides between two calls


def test_scan_is_a_loop_of_steps():
    batches = [batch_of(4, seed=seed) for seed in range(3)]
    step = jax.jit(train.make_train_step(OBJECTIVE, optax.adam(0.01), flip_horizontal()))
    start = looped = state_of(tx=optax.adam(0.01))
    losses = []
    for batch in batches:
        looped, metrics = step(looped, batch)
        losses.append(metrics["loss"])
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    scanned, metrics = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(start, stacked)
    close(scanned, looped)
    close(metrics["loss"], jnp.stack(losses))


def test_vmap_over_seeds_is_each_seed():
    keys, batch, tx = jax.random.split(KEY, 3), batch_of(4), optax.sgd(0.1)
    init = jax.jit(lambda key: train.init(key, OBJECTIVE, tx, batch))
    step = train.make_train_step(OBJECTIVE, tx, flip_horizontal())
    states = jax.jit(jax.vmap(init))(keys)
    together, _ = jax.jit(jax.vmap(step, in_axes=(0, None)))(states, batch)
    for i, key in enumerate(keys):
        alone, _ = jax.jit(step)(init(key), batch)
        close(jax.tree.map(lambda x, i=i: x[i], together), alone)


def test_uint8_is_float():
    batch = batch_of(4) | {"image": jnp.asarray(source_of(4).images)}
    step = jax.jit(train.make_train_step(OBJECTIVE, optax.sgd(0.1)))
    state = state_of(tx=optax.sgd(0.1))
    close(step(state, batch), step(state, batch | {"image": batch["image"].astype(jnp.float32) / 255}))
    del batch["mask"]
    assert float(step(state, batch)[1]["loss"]) > 0  # without a mask every image counts


@pytest.mark.parametrize("way", ["shard_map", "shard_map unchecked", "pmap"])
def test_axis_name_is_one_device(way):
    """Four devices, each with another number of masked images, give the step of one device."""
    objective, tx = objectives.rotation(Dense(4)), optax.sgd(0.1, momentum=0.9)
    batch = batch_of(8) | {"mask": jnp.array([1.0, 1, 0, 1, 0, 0, 1, 1])}
    state = train.init(KEY, objective, tx, batch)
    wanted = jax.jit(train.make_train_step(objective, tx))(state, batch)
    step = train.make_train_step(objective, tx, axis_name="data")
    if way == "pmap":
        parts = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
        found = jax.pmap(step, "data", in_axes=(None, 0), devices=jax.devices()[:4])(state, parts)
        found = jax.tree.map(lambda x: x[0], found)
    else:
        shared, split = PartitionSpec(), PartitionSpec("data")
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        sharded = jax.shard_map(
            step, mesh=mesh, in_specs=(shared, split), out_specs=(shared, shared), check_vma=way == "shard_map"
        )
        found = jax.jit(sharded)(state, batch)
    close(found, wanted)


def test_axis_name_with_batch_norm_and_augmentation():
    """Each device has its own statistics and draws; what comes out is shared and counts every image."""
    step = train.make_train_step(FROZEN, optax.sgd(0.1), flip_horizontal(), axis_name="data")
    state = state_of(FROZEN, optax.sgd(0.1), freeze=("block1",))
    shared, mesh = PartitionSpec(), Mesh(np.array(jax.devices()[:2]), ("data",))
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(shared, PartitionSpec("data")), out_specs=shared, check_vma=False
    )
    after, metrics = jax.jit(sharded)(state, batch_of(4))
    assert np.isfinite(float(metrics["loss"]))
    before, after = state.extra["model"], after.extra["model"]
    same(after["standardise"], before["standardise"])
    same(after["batch_stats"]["block1"], before["batch_stats"]["block1"])
    assert np.any(np.asarray(after["batch_stats"]["block2"]["norm"]["mean"]))


def test_what_is_frozen_stays():
    """Parameters, statistics and output of a frozen part, bit for bit, and no optimiser state for it."""
    tx, batch = optax.adam(0.1), batch_of(4)
    state = state_of(FROZEN, tx, freeze=("block1",))
    step = jax.jit(train.make_train_step(FROZEN, tx))

    def block1(state, train):
        params = merge(state.params, state.frozen)
        model = Small(outputs=4, frozen=("block1",))
        return jax.jit(forward, static_argnames=("model", "train"))(
            model, params, state.extra["model"], batch["image"], train=train
        ).features["block1"]

    after = state
    for _ in range(3):
        after, _ = step(after, batch)
    same(after.frozen, state.frozen)
    assert set(state.frozen) == {"block1"} and set(state.params) == {"block2", "head"}
    assert state.opt_state[0].mu.keys() == {"block2", "head"}
    same(after.extra["model"]["batch_stats"]["block1"], state.extra["model"]["batch_stats"]["block1"])
    for training in (False, True):
        same(block1(after, training), block1(state, training))
    assert np.any(np.asarray(after.params["block2"]["dense"]["kernel"] != state.params["block2"]["dense"]["kernel"]))


def test_own_module_and_objective():
    """The README's example: a module, an objective of two functions and an optimiser of one's own."""

    class Mine(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(8)(x.mean((1, 2)))))[:, 0]

    model = Mine()

    def init(key, batch):
        return model.init(key, batch["image"])["params"], {}

    def loss(params, extra, batch, key, train=True):
        error = jnp.square(model.apply({"params": params}, batch["image"]) - batch["label"])
        return objectives.masked_mean(error, batch["mask"]), ({}, extra)

    objective, tx, batch = objectives.Objective(init, loss), optax.adam(0.05), batch_of(16, channels=3)
    state = train.init(KEY, objective, tx, batch)
    step = jax.jit(train.make_train_step(objective, tx), donate_argnums=0)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    set_apart, extra = init(KEY, batch)
    data, plan = {"image": batch["image"], "label": batch["label"]}, plan_of(16, batch_size=5, epochs=2, rate=0.05)
    state = create(KEY, set_apart, extra, optimiser.with_rate(optax.adam))
    assert int(loop.run(state, data, plan, objective, optimiser.with_rate(optax.adam)).step) == 8


# weights that move


def test_partition_by_name_and_path():
    params = state_of().params
    trained, frozen = partition(params, ("block1", "block2/norm"))
    assert set(frozen) == {"block1", "block2"} and set(frozen["block2"]) == {"norm"}
    assert set(trained) == {"block2", "head"} and set(trained["block2"]) == {"dense"}
    same(merge(trained, frozen), params)
    with pytest.raises(UserError, match="cannot freeze 'block': the network has block1, block2, head"):
        partition(params, ("block",))


def weights(seed=0, model=None, side=6):
    params, extra = objectives.supervised(model or Small(outputs=4)).init(jax.random.key(seed), batch_of(1, side=side))
    return {"params": params, "batch_stats": extra["model"]["batch_stats"]}


def actions(lines):
    return {line["tensor"]: line["action"] for line in lines}


def test_carry_copies_every_tensor():
    source, target = weights(0), weights(1)
    result, lines = carry(source, target)
    same(result, source)
    assert len(lines) == len(jax.tree.leaves(target)) and set(actions(lines).values()) == {"copied"}
    assert {"tensor": "params/block1/dense/kernel", "action": "copied", "shape": [2, 4]} in lines


def test_carry_is_strict_both_ways():
    source, target = weights(0), weights(1, Small(outputs=3))
    with pytest.raises(UserError, match=r"params/head/bias is float32\[4\], wanted float32\[3\].*`fresh`"):
        carry(source, target)
    deeper = weights(1, Small(outputs=4, widths=(4, 6, 6)))
    with pytest.raises(UserError, match="params/block3/dense/bias is missing.*batch_stats/block3/norm/mean is missing"):
        carry(source, deeper)
    with pytest.raises(UserError, match="params/block3/dense/bias has no place"):
        carry(deeper, target | {"params": {**target["params"], "head": source["params"]["head"]}})
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), source)
    with pytest.raises(UserError, match=r"is bfloat16\[4\], wanted float32\[4\].*; and \d+ more"):
        carry(half, source)
    with pytest.raises(UserError, match="'haed' in `fresh` is in neither network"):
        carry(source, weights(1), fresh=("haed",))


def test_carry_with_fresh_modules():
    source, target = weights(0, Small(outputs=4, widths=(4, 6, 6))), weights(1, Small(outputs=3))
    result, lines = carry(source, target, fresh=("head", "block3"))
    same(result["params"]["head"], target["params"]["head"])
    same(result["params"]["block1"], source["params"]["block1"])
    same(result["batch_stats"]["block2"], source["batch_stats"]["block2"])
    found = actions(lines)
    assert found["params/block3/dense/kernel"] == found["batch_stats/block3/norm/mean"] == "dropped"
    assert found["params/block2/dense/kernel"] == "copied"
    both = [line["action"] for line in lines if line["tensor"] == "params/head/kernel"]
    assert sorted(both) == ["dropped", "fresh"]


def test_carry_under_a_trunk():
    source, target = weights(0), weights(1, models.LinearProbe(Small(outputs=4), outputs=3))
    result, lines = carry(source, target, under="trunk")
    same(result["params"]["trunk"], source["params"])
    same(result["batch_stats"]["trunk"], source["batch_stats"])
    same(result["params"]["probe_block1"], target["params"]["probe_block1"])
    assert {name for name, action in actions(lines).items() if action == "fresh"} == {
        f"{kind}/probe_block{i}/{leaf}"
        for i in (1, 2)
        for kind, leaves in (("params", ("dense/kernel", "dense/bias")), ("batch_stats", ("norm/mean", "norm/var")))
        for leaf in leaves
    }
    with pytest.raises(UserError, match="params/trunk/block2/dense/bias is missing"):
        carry(weights(0, Small(outputs=4, widths=(4,))), target, under="trunk")


def test_carry_of_alexnet_between_scales():
    """From 112 to 224 pixels the first dense layer has another shape, nothing else (shapes alone are compared)."""

    def shapes(side):
        return models.catalogue.shapes(models.build("alexnet_rotnet", outputs=4), side)

    half, full = shapes(112), shapes(224)
    with pytest.raises(
        UserError, match=r"params/fc1/dense/kernel is float32\[1024, 4096\], wanted float32\[9216, 4096\]"
    ):
        carry(half, full)
    result, lines = carry(half, full, fresh=("fc1",))
    fresh = {line["tensor"].split("/")[1] for line in lines if line["action"] == "fresh"}
    assert fresh == {"fc1"}
    assert jax.tree.map(lambda x: x.shape, result) == jax.tree.map(lambda x: x.shape, full)


# the loop


def by_hand(plan, source, objective=OBJECTIVE, tx=SGD, augment=None):
    """The loop's training as plain steps: the state, and per step the metrics weighted by the images."""
    step = jax.jit(train.make_train_step(objective, tx, augment))
    state, entries = state_of(objective, tx), []
    data = data_of(source)
    for epoch in range(plan.epochs):
        for rows, mask in zip(*plan.batches(epoch), strict=True):
            state = state.replace(opt_state=optimiser.set_rate(state.opt_state, plan.rates[len(entries)]))
            batch = {name: jnp.asarray(values[rows]) for name, values in data.items()}
            state, metrics = step(state, batch | {"mask": jnp.asarray(mask), "index": jnp.asarray(rows)})
            entries.append({name: float(value) for name, value in metrics.items()} | {"weight": mask.sum()})
    return state, entries


def test_loop_is_a_loop_of_steps():
    """Weights, and the epoch's means over 10 images in batches of 4, 4 and 2; the rate arrives at each step."""
    source, seen = source_of(10), []
    plan = plan_of(10)
    wanted, steps = by_hand(plan, source, augment=flip_horizontal())
    watch = loop.Watch(on_epoch=seen.append)
    augment = flip_horizontal()
    found = loop.run(state_of(), data_of(source), plan, OBJECTIVE, SGD, augment, watch=watch)
    close(found, wanted)
    assert [(e["epoch"], e["step"], e["split"]) for e in seen] == [(1, 3, "train"), (2, 6, "train")]
    for epoch, entry in enumerate(seen):
        part = steps[3 * epoch : 3 * epoch + 3]
        assert [step["weight"] for step in part] == [4, 4, 2]
        for name in ("loss", "accuracy", "grad_norm"):
            mean = sum(step[name] * step["weight"] for step in part) / 10
            assert entry[name] == pytest.approx(mean, rel=1e-5)
        assert entry["rate"] == pytest.approx(float(plan.rates[3 * epoch + 2]))
    assert float(found.opt_state.hyperparams["rate"]) == plan.rates[-1]


def test_loop_needs_an_optimiser_with_a_rate():
    with pytest.raises(UserError, match="holds no rate"):
        loop.run(state_of(tx=optax.sgd(0.1)), data_of(source_of(4)), plan_of(4), OBJECTIVE, optax.sgd(0.1))


@pytest.mark.parametrize("count", [1, 4])
def test_nothing_is_compiled_after_the_first_step(devices, count, caplog):
    """Neither in later epochs nor for another seed of the same stage."""
    devices(count)
    objective, compiled = objectives.rotation(Small(outputs=4)), []

    def note(entry):
        compiled.append(sum("Compiling jit(advance)" in line for line in caplog.messages))

    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        for order in (1, 2):
            plan, watch = plan_of(10, epochs=3, order=order), loop.Watch(on_epoch=note)
            loop.run(state_of(objective), data_of(source_of(10)), plan, objective, SGD, watch=watch)
    assert compiled == [1] * 6


@pytest.mark.parametrize(("count", "batch_size", "used"), [(8, 8, 8), (8, 6, 6), (8, 7, 7), (2, 5, 1)])
def test_devices_give_the_numbers_of_one(devices, count, batch_size, used, caplog):
    """Batch norm is global over the mesh; a batch that the devices do not divide goes to fewer."""
    source, plan, ends, means = source_of(20), plan_of(20, batch_size=batch_size), [], []
    for number in (1, count):
        devices(number)
        seen = []
        with caplog.at_level(logging.WARNING, "jaxsd"):
            logging.getLogger("jaxsd").propagate = True
            ends.append(
                loop.run(state_of(), data_of(source), plan, OBJECTIVE, SGD, watch=loop.Watch(on_epoch=seen.append))
            )
        means.append([entry["loss"] for entry in seen])
        where = loop.data_mesh(batch_size)
        assert (where.size if where else 1) == (used if number == count else 1)
    close(ends[0], ends[1], rtol=2e-4, atol=2e-5)
    assert means[0] == pytest.approx(means[1], rel=1e-4)
    assert len(ends[1].params["head"]["bias"].sharding.device_set) == used
    assert ("take a multiple" in caplog.text) == (used < count)


def test_evaluation_is_exact_and_takes_weights_from_anywhere(devices):
    """The mean over 10 images in batches of 4 is that of one batch; weights of one device serve a mesh."""
    source, state = source_of(10), state_of()
    batch = {name: jnp.asarray(values) for name, values in data_of(source).items()}
    batch |= {"mask": jnp.ones(10), "index": jnp.arange(10), "step": jnp.zeros((), jnp.int32)}
    batch["image"] = batch["image"].astype(jnp.float32) / 255
    loss, (metrics, _) = jax.jit(lambda p, e: OBJECTIVE.loss(p, e, batch, KEY, train=False))(state.params, state.extra)
    committed = jax.device_put((state.params, state.extra), jax.devices()[0])
    for count in (1, 4):
        devices(count)
        found = loop.evaluate(OBJECTIVE, *committed, data_of(source), batch_size=4)
        assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert found["accuracy"] == pytest.approx(float(metrics["accuracy"]))


def test_order_is_a_function_of_seed_and_epoch():
    first, again, other = plan_of(20, order=1), plan_of(20, order=1), plan_of(20, order=2)
    for epoch in (0, 5):
        same(list(first.batches(epoch)), list(again.batches(epoch)))
        assert np.any(first.batches(epoch)[0] != other.batches(epoch)[0])
    assert np.any(first.batches(0)[0] != first.batches(1)[0])


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    checkpoints, journal = Checkpoints(tmp_path / "checkpoints"), Journal(tmp_path / "metrics.jsonl")
    plan = plan_of(10, epochs=4)
    plan.rates[4:] = 1e30
    watch = loop.Watch("half seed 3", checkpoints, journal, save_seconds=0)
    with pytest.raises(RunError) as error:
        loop.run(state_of(), data_of(source_of(10)), plan, OBJECTIVE, SGD, watch=watch)
    checkpoints.close()
    text = str(error.value)
    assert "at half seed 3, step " in text and "rate 1e+30" in text and "(epoch 2)" in text and "\n" not in text
    kept = int(text.split("checkpoint of step ")[1].split()[0])
    assert 4 <= kept <= 5  # saved after every step until then, and finite
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1]


def test_weights_that_are_no_numbers_stop_the_run():
    """At the last step the loss is still that of the weights before."""
    plan = plan_of(10, epochs=1)
    plan.rates[-1] = np.inf
    with pytest.raises(RunError, match=r"a weight became infinite or NaN at training, step 3 \(epoch 1\), rate inf"):
        loop.run(state_of(), data_of(source_of(10)), plan, OBJECTIVE, SGD)
