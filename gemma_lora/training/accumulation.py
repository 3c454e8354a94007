"""Several batches that make one optimizer step: the step of one large batch of all their rows.

Keras's own accumulation (`gradient_accumulation_steps`) averages the batches' gradients. That is the gradient of one
large batch only where all batches carry the same weight, which packed rows and masked prompts do not. Its optimizers
also count batches where their schedules count steps. So gradients are summed here, and the optimizer sees steps only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gemma_lora.base.keras_on_jax import keras


class Accumulation:
    """Sums gradients until they make a step: gradient = Σ weight · (a batch's mean gradient) / Σ weight.

    Invariants: the sums are variables of the optimizer, so they are kept and given back with its state. Between steps
    all are zero; within one, `count` < `batches` holds how many batches were added.

    Args:
        optimizer: A built Keras optimizer.
        variables: The trainable variables that it was built with.
        batches: Integer, batches that make a step.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, variables: list[keras.Variable], batches: int):
        self.optimizer, self.variables, self.batches = optimizer, list(variables), batches
        self.gradients = [optimizer.add_variable_from_reference(v, name="gradient_sum") for v in variables]
        self.weight = optimizer.add_variable((), dtype="float32", name="weight_sum")
        self.count = optimizer.add_variable((), dtype="int32", name="batches_in_step")
        mine = [*self.gradients, self.weight, self.count]
        place = {id(variable): index for index, variable in enumerate(optimizer.variables)}
        self._places = [place[id(variable)] for variable in mine]

    def add(self, trainable: list, state: list, gradients: list, weight: Any) -> tuple[list, list]:
        """Adds a batch; the last one of a step makes it.

        Args:
            trainable: Arrays, the trainable variables' values.
            state: Arrays, the values of the optimizer's variables.
            gradients: Arrays, the gradient of the batch's mean loss.
            weight: Scalar, Σ of the weights of the batch's tokens.

        Returns:
            `(trainable, state)` afterwards.
        """
        *sums, total, count = (state[place] for place in self._places)
        sums = [old + (weight * new).astype(old.dtype) for old, new in zip(sums, gradients, strict=True)]
        state = self._with(state, [*sums, total + weight, count + 1])
        return jax.lax.cond(count + 1 >= self.batches, self.step, lambda *unchanged: unchanged, trainable, state)

    def step(self, trainable: list, state: list) -> tuple[list, list]:
        """Makes the step of the batches that were added: `(trainable, state)` afterwards."""
        *sums, total, count = (state[place] for place in self._places)
        share = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
        means = [(share * one).astype(one.dtype) for one in sums]
        state = self._with(state, [jnp.zeros_like(one) for one in (*sums, total, count)])
        after, changed = self.optimizer.stateless_apply(state, means, trainable)
        # The types of what came in, as both branches of `add` need.
        return _like(trainable, after), _like(state, changed)

    def end(self) -> None:
        """Makes a step of the batches that were added so far, if there are any; works on the variables."""
        if not int(self.count.value):
            return
        variables = self.variables, self.optimizer.variables
        made = jax.jit(self.step)(*([variable.value for variable in group] for group in variables))
        for group, values in zip(variables, made, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)

    def forget(self) -> None:
        """Drops the batches that were added and made no step yet."""
        for variable in (*self.gradients, self.weight, self.count):
            variable.assign(jnp.zeros(variable.shape, variable.dtype))

    def _with(self, state: list, values: list) -> list:
        state = list(state)
        for place, value in zip(self._places, values, strict=True):
            state[place] = value
        return state


def _like(before: list, after: list) -> list:
    return [new.astype(old.dtype) for old, new in zip(before, after, strict=True)]


def accumulates_itself(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether Keras's own accumulation is on in the optimizer, or in the one that it wraps."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return bool(optimizer.gradient_accumulation_steps or inner.gradient_accumulation_steps)
