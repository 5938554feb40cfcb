"""What makes a step worthless, noticed before it is taken or told after: one file for each cause."""
