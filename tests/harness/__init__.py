"""Train one small model in many ways, and compare each with a reference: the same training in plain torch.

* ``regression``: the networks, the data and the losses, in plain torch.
* ``cells``: the crossed cells of the matrix, and what a cell fixes (windows, learning rate, tolerance).
* ``reference_loop``: the training loop in plain torch, and :class:`Formula`, the base of a technique in it.
* ``*_formulas``: the techniques of a family as formulas of that loop, as in their papers, without code of the package.
* ``models``: the regression as Lightning modules, and a loader that saves its position.
* ``process_group``: groups of two processes that live from job to job.
* ``run``: one fit of one cell, in this process or in a group, and the weights, losses and logs that it ended with.
"""
