"""`quantspec plan`: which draft, and how many tokens a round, for a model, a context and a device.

Each format of the draft at each γ is given the time a token that the cost model
(`quantspec_jax.cost`) says, beside plain decoding, and the memory it needs. A pass takes what its
bytes take at the device's bandwidth, or its arithmetic where that takes longer, divided by the
share of that limit which the kernels reach (1: the limit itself).

devices.py has the data sheets, candidates.py the drafts to choose from, setting.py what a pass
reads and needs there, plan.py the choice, recorded.py what is read from recorded runs, and
report.py, alone, says it in English.
"""
