"""Training with salience: Eq. 2-5, the loop, and runs that can be resumed."""
