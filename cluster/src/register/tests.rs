//! Dialogues with the two machines of the register.
