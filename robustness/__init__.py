"""What only the evaluator and the measuring script use."""
