"""A plain PyTorch loop with steppe in it. `steppe score own_loop.toml` scores beside it, in another terminal."""

import torch
from digits import dataset, network
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import steppe

EPOCHS = 30
torch.set_num_threads(1)  # leaves a core to the scorer

train = dataset("train")
model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run = steppe.open_run("runs/digits")
publisher = steppe.CheckpointPublisher(run.path)
sampler = steppe.CurriculumSampler(len(train), run.scores, epochs=EPOCHS)
loader = DataLoader(train, batch_size=64, sampler=sampler)
step = 0
for epoch in range(EPOCHS):
    total = 0.0
    for x, y in loader:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, total = step + 1, total + loss.item()
        if step % 20 == 0:
            publisher.publish(model, step)
    draws = sampler.draws
    print(f"epoch {epoch + 1}: loss {total / len(loader):.4f}, {draws.fresh} of {draws.total} draws by fresh scores")
