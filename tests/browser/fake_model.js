// What a widget's script sees of its model, without Jupyter.
(() => {
  const decode = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const listeners = new Map();
  const tell = (name, ...what) => [...(listeners.get(name) ?? [])].forEach((act) => act(...what));
  let state = {};
  let unsaved = {};
  let saved = {};
  let messages = [];

  const model = {
    get: (name) => state[name],
    set(name, value) {
      if (JSON.stringify(state[name]) === JSON.stringify(value)) return;
      state[name] = unsaved[name] = value;
      tell(`change:${name}`);
    },
    save_changes() {
      Object.assign(saved, unsaved);
      unsaved = {};
    },
    send: (message) => messages.push(message),
    on: (name, act) => listeners.set(name, [...(listeners.get(name) ?? []), act]),
    off: (name, act) => listeners.set(name, (listeners.get(name) ?? []).filter((other) => other !== act)),
    listenerCount: () => [...listeners.values()].flat().length,
  };

  window.start = async (esm, css, sent, paths, buffers, width) => {
    state = sent;
    paths.forEach((path, i) => {
      const last = path.at(-1);
      path.slice(0, -1).reduce((inside, key) => inside[key], state)[last] = decode(buffers[i]);
    });
    const style = document.createElement("style");
    style.textContent = css;
    const el = document.createElement("div");
    el.style.width = `${width}px`;
    document.body.append(style, el);
    const url = URL.createObjectURL(new Blob([esm], { type: "text/javascript" }));
    window.mod = await import(url);
    window.model = model;
    window.stopModel = await mod.default.initialize?.({ model });
    const began = performance.now();
    window.stop = await mod.default.render({ model, el });
    window.paintedIn = performance.now() - began;
    window.el = el;
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    window.shownIn = performance.now() - began;
  };
  window.receive = (message, buffers) => tell("msg:custom", message, buffers.map(decode));
  window.fromPython = (name, value) => {
    state[name] = value;
    tell(`change:${name}`);
  };
  window.takeOut = () => {
    const out = [saved, messages];
    [saved, messages] = [{}, []];
    return out;
  };
})();
