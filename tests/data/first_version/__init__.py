"""Checkpoints of the first version of this package, and how the runs of which they are part ended.

* ``cases``: what was trained with which callbacks; the entries of the registry, and what they leave out.
* ``models``: the modules and their data.
* ``runs``: one run up to its file, from its file, or whole, and what is read of it.
* ``ensembles``, ``ranks``: the same for ensembles, and for runs of two processes; their files are listed there.
* ``write``: the command that wrote the files.
* ``<case>.ckpt.xz``: the checkpoint, from the middle of the run, as Lightning wrote it; compressed.
* ``<case>.end.xz``: what the run was at that moment, what it ended with, and the callbacks' state then.
"""
