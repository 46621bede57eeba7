"""The Triton kernels. Importing a file of this folder imports Triton, so nothing outside it does before a call comes.

A kernel is for one head group and one union member. All three axes are always there; those that the grid lacks (the
first ones) have one token and no table. Names: `p_` a pointer, `o_` an offset, `s_` a stride, `b_` a block's values,
`n_` and `m_` the query and key grid; `M` counts the queries of a block and `N` its keys.
"""
