from .test_sweep import *
@given(problems(), st.sampled_from([torch.float32,torch.float64]))
@settings(max_examples=5000)
def test_q(problem, dtype):
    check(problem, dtype)
