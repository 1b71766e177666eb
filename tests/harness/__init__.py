"""The test machine: one small problem, many ways to train it, and the same training written out by hand.

* ``problem``: the network, the data and the losses, in plain torch.
* ``cells``: the crossed cells of the matrix, and what a cell fixes (windows, learning rate, tolerance).
* ``by_hand``: the reference loop in plain torch; a technique is a :class:`~tests.harness.reference_loop.Formula`.
* ``formulas`` and ``*_formulas``: the techniques by hand.
* ``models``: the same problem as Lightning modules, and a loader that saves its position.
* ``groups``: living groups of two processes that take jobs.
* ``run``: one fit of one cell, in this process or in a group, and what came out of it.
"""
