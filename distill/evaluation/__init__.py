"""How good a model is: sampled responses to held-out problems, graded and counted."""
