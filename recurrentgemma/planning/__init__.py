"""Planning: what a program takes on TPUs that are not here, from their real compiler."""
