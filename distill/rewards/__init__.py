"""What a whole response is worth, and what that says about the response beside others to the same prompt."""
