//! DockFlare Agent.
