"""From images to pictures of what speaks for and against a decision."""
