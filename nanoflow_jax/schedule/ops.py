"""The op graph of one layer, in the paper's names, and the resource that each op is bound by.

KQV includes the norm before it, rotary embedding and the KV append; UG includes the norm before it, SiLU and the
product. How attention output becomes the next residual is a strategy of each nano-batch (rows n, p devices, hidden
H, head width w = heads * d):

    gather   GEMV.AG [n, w/p] -> [n, w],  O split over N [n, H/p],  O.AG -> [n, H]           D.AR
    reduce   O split over K: partial sums [n, H],  O.AR                                      D.AR
    scatter  O split over K,  O.RS -> [n/p, H],  norm on the shards,  O.AG -> [n, H]         D.RS, D.AG (norm between)
"""

from __future__ import annotations

COMPUTE, MEMORY, NETWORK = "compute", "memory", "network"

# In dependency order, which is also the issue order of a plan that names none: op by op, each over all its pieces.
RESOURCE = {
    "KQV": COMPUTE,
    "GEMV": MEMORY,
    "PF": COMPUTE,
    "GEMV.AG": NETWORK,
    "O": COMPUTE,
    "O.RS": NETWORK,
    "O.AG": NETWORK,
    "O.AR": NETWORK,
    "UG": COMPUTE,
    "D": COMPUTE,
    "D.AR": NETWORK,
    "D.RS": NETWORK,
    "D.AG": NETWORK,
}

# Ops over the rows of a nano-batch, after attention, in dependency order.
STRATEGIES = {
    "gather": ("GEMV.AG", "O", "O.AG", "UG", "D", "D.AR"),
    "reduce": ("O", "O.AR", "UG", "D", "D.AR"),
    "scatter": ("O", "O.RS", "O.AG", "UG", "D", "D.RS", "D.AG"),
}

# Ops that may run on a stream of their own: bound by memory, with a kernel that can leave SMs to a GEMM.
LANE_OPS = ("GEMV",)

# Ops whose rows a plan may cut finer than the nano-batches.
SPLITTABLE = ("KQV", "GEMV", "PF")
